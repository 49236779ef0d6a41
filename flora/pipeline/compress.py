"""From a trained model and a budget to a verified bundle: the paper's road as one resumable chain.

What the steps make lies in `OUT.work` and stays there: the trained supernet holds every other budget, too. As in make,
a step is done again only where what it comes from or its settings have changed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from export.bundle import MANIFEST, Bundle, load_bundle
from flora.artifact import check_replaceable
from flora.errors import BadLossError, InputError
from flora.imagesets import ImageSetRecord, ImageSetSpec, at_most
from flora.lowrank.checkpoint import RANK_CONFIG, LoadedModel
from flora.lowrank.targets import find_targets, trace_cost
from flora.pipeline.build import build
from flora.pipeline.compact import materialize_job, with_reference_of
from flora.pipeline.export import export_job
from flora.pipeline.export_request import ExportRequest
from flora.pipeline.filter import FilterRequest, filter_space
from flora.pipeline.images import (
    certified_images,
    names_by_digest,
    refuse_duplicates,
    training_record,
)
from flora.pipeline.job import OnStart, folder_of_steps, forget_unfinished
from flora.pipeline.latency import LatencyRequest
from flora.pipeline.search import SearchRequest, budget_slug, search, subnets_within_reach
from flora.pipeline.timed import check_budget, check_latency, latency_request, table_of, timed_export
from flora.pipeline.train import TrainRequest, check_training, train
from flora.preprocessing import Preprocessing
from flora.ranks.budget import asks_for_drop
from flora.ranks.config import RankConfig
from flora.ranks.cost import ModelCost
from flora.ranks.evolution import SearchSettings
from flora.ranks.filtering import kept_count, reachable_macs
from flora.ranks.space import SearchSpace, space_from_text
from flora.resume import WorkFolder
from flora.training.data import TimmImages
from flora.training.processes import is_main, processes, wait
from flora.training.selection import Fitness, check_fitness
from flora.training.settings import TrainingSettings

CALIBRATION_IMAGES = 512
FILTER_IMAGES = 2000
SEARCH_IMAGES = 5000
HELD_OUT = "1/10"
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class CompressRequest:
    """`data` is trained on; without `select_data` every tenth image of it is held out to choose by instead.

    A budget in milliseconds goes by `latency_table`, or by one that is measured here, for the runtime of `export`. The
    supernet trains for the epochs of `settings`, the subnet that the search finds for `finetune_epochs` more.
    """

    data: str
    budget: str
    export: ExportRequest
    settings: TrainingSettings
    finetune_epochs: int
    calib_data: str | None = None
    select_data: str | None = None
    layers: tuple[str, ...]
    space: str
    share: float = 0.3
    fitness: Fitness = "loss"
    latency_table: Path | None = None
    search: SearchSettings = field(default_factory=SearchSettings)
    teacher: str = "dense"
    teacher_checkpoint: Path | None = None
    device: torch.device = CPU
    workers: int = 0
    restart: bool = False

    @property
    def image_sets(self) -> tuple[str, str, str]:
        """Calibration, selection and training images: the first two parts of `data` where they are not given."""
        training, selection = self.data, self.select_data
        if selection is None:
            spec = ImageSetSpec.parse(self.data)
            if spec.fold or spec.left_out or spec.limit:
                raise InputError(f"{self.data} is a part of a set already; say what to choose by with --select-data.")
            training, selection = f"{self.data},except={HELD_OUT}", f"{self.data},fold={HELD_OUT}"
        # A part of a part cannot be named, so the limit goes to the training set itself.
        calibration = self.calib_data or at_most(training, CALIBRATION_IMAGES)
        return calibration, selection, training

    def space_of(self, cost: ModelCost) -> SearchSpace:
        """What ranks are chosen from, before filtering."""
        return space_from_text(self.space, cost)

    @property
    def latency(self) -> LatencyRequest | None:
        """The measurement that a budget in milliseconds goes by; None for another budget."""
        return None if asks_for_drop(self.budget) else latency_request(self.budget, self.layers, self.export)

    def training(self, epochs: int) -> TrainRequest:
        """How the supernet and the subnet that was found are trained."""
        return TrainRequest(
            data=self.image_sets[2],
            settings=self.settings.with_epochs(epochs),
            teacher=self.teacher,
            teacher_checkpoint=self.teacher_checkpoint,
            device=self.device,
            workers=self.workers,
        )


def compress(
    model: LoadedModel,
    out: Path,
    request: CompressRequest,
    *,
    on_start: OnStart = lambda done: None,
    on_step: Callable[[str], None] = lambda step: None,
    on_line: Callable[[str], None] = lambda line: None,
    steps: Path | None = None,
) -> Bundle:
    """Write the bundle `out`; stopped, the same call goes on with the step that was not finished.

    `on_start` is told whether the bundle is there already, when the steps before it are done. These lie in the folder
    `steps`, by default in `OUT.work`.
    `on_step` gets what is being done, every moment; `on_line` what is worth keeping: what is within reach, then each
    filtered block, each epoch and each generation.
    """
    check_replaceable(out, marker=MANIFEST)
    calibration, selection, _ = request.image_sets
    processes(request.device)
    steps = steps or folder_of_steps(out)
    cost = refuse_early(model, request)
    table, table_file = table_of(model, cost, request, steps, on_step)
    _tell_reach(model, request, on_line)
    supernet, filtered, trained = (steps / name for name in ("supernet", "filtered", "trained"))
    found, compact, tuned = (
        steps / f"{name}-{budget_slug(request.budget)}" for name in ("search", "compact", "finetuned")
    )
    if request.restart:
        forget_unfinished(filtered, trained, found, tuned)

    def begins(what: str, *later: Path) -> OnStart:
        """What the step that begins says, unless it would make void what `later` ones have left unfinished."""

        def note(done: bool) -> None:
            if done:
                return
            for work in (WorkFolder.of(job).path for job in later):
                if work.exists():
                    raise InputError(
                        f"{work} holds an unfinished job, which {what} anew would make void. "
                        "Type the former command to go on with it, or add --restart to throw it away."
                    )
            on_step(what)

        return note

    def train_step(source: Path, out: Path, epochs: int, what: str, *later: Path) -> None:
        def note_epoch(figures: dict[str, Any]) -> None:
            seconds = f"{figures['seconds']:.1f} s"
            on_line(f"{what}: epoch {figures['epoch']} of {epochs}, loss {figures['loss']:.4f}, {seconds}")

        try:
            train(
                source,
                out,
                request.training(epochs),
                on_start=begins(what, *later),
                on_step=lambda step, steps, loss: on_step(f"{what}: step {step} of {steps}, loss {loss:.3f}"),
                on_epoch=note_epoch,
            )
        except BadLossError as error:
            if source != compact:
                raise
            raise BadLossError(
                f"{error} Here they are the supernet's as well, which would be trained anew: rather fine-tune by "
                f"flora train {source} --data IMAGES -o TUNED, and then flora export TUNED."
            ) from error

    if is_main():
        model.module.to(request.device)
        build(
            model,
            supernet,
            data=calibration,
            layers=request.layers,
            space=request.space,
            workers=request.workers,
            on_start=begins("factorizing", filtered, trained, found, tuned),
        )
    wait()
    kept, _ = filter_space(
        supernet,
        filtered,
        FilterRequest(
            select_data=at_most(selection, FILTER_IMAGES),
            share=request.share,
            device=request.device,
            workers=request.workers,
        ),
        on_start=begins("filtering candidates", trained, found, tuned),
        on_block=lambda scores: on_line(f"filtering candidates: {scores.block}"),
    )
    if table is not None and request.latency is not None:
        # Of each block filtering keeps the candidate of the fewest MACs, which need not be the fastest.
        check_latency(request.budget, table, request.latency, kept.config.space, cost)
    on_line(f"space after filtering: {_extent(kept.config.space, kept.config.cost)}")
    train_step(filtered, trained, request.settings.epochs, "training the supernet", found, tuned)
    search(
        trained,
        found,
        SearchRequest(
            select_data=at_most(selection, SEARCH_IMAGES),
            budgets=(request.budget,),
            latency_table=table_file,
            fitness=request.fitness,
            settings=request.search,
            device=request.device,
            workers=request.workers,
        ),
        on_start=begins("searching", tuned),
        on_generation=lambda state: on_line(
            f"searching: generation {state.generation} of {request.search.generations}"
        ),
    )
    ranks = RankConfig.load(found / RANK_CONFIG)
    materialize_job(trained, ranks, compact, on_start=begins("materializing", tuned))
    shipped = compact
    if request.finetune_epochs:
        train_step(compact, tuned, request.finetune_epochs, "fine-tuning")
        shipped = tuned
    if is_main():
        export = request.export.made_with(calibration, at_most(selection, SEARCH_IMAGES))
        export = timed_export(export, request.latency, ranks, table)
        export_job(with_reference_of(compact, shipped), export, out, on_start=on_start, on_step=on_step)
    wait()
    return load_bundle(out)


def _tell_reach(model: LoadedModel, request: CompressRequest, tell: Callable[[str], None]) -> None:
    """Which subnets there will be, before anything is spent."""
    targets = find_targets(model.module, request.layers)
    cost = trace_cost(model.module, targets, model.config.preprocessing.input_size)
    space = space_from_text(request.space, cost)
    for name, ranks in subnets_within_reach(space, cost).items():
        macs, params = cost.macs(ranks), cost.params(ranks)
        tell(
            f"{name} subnet: {macs / 1e6:.2f} M MACs ({macs / cost.dense_macs:.1%} of dense), "
            f"{params / 1e6:.2f} M parameters ({params / cost.dense_params:.1%})"
        )
    tell(f"space before filtering: {_extent(space, cost)}")


def _extent(space: SearchSpace, cost: ModelCost) -> str:
    smallest, largest, mean = (f"{macs / 1e6:.2f} M" for macs in reachable_macs(space, cost))
    return f"{float(space.size):.3g} configs from {smallest} to {largest} MACs, mean {mean}"


def refuse_early(model: LoadedModel, request: CompressRequest) -> ModelCost:
    """The model's cost; `InputError` for what a step would refuse after hours: budget, engines, images, training."""
    cost, preprocessing = check_budget(model, request), model.config.preprocessing
    classes, space = cast(int, model.module.num_classes), request.space_of(cost)
    for index in range(len(space.blocks)):
        space.block_candidates(index)
    kept_count(request.share, 1)
    request.export.engine_specs()
    calibration, selection, training = (TimmImages(text, preprocessing) for text in request.image_sets)
    held_out = _names_of_chosen_by(selection.text, preprocessing)
    records = {
        "selection": ImageSetRecord.of(selection.text, len(held_out), list(held_out)),
        "calibration": calibration.record(),
        "training": training_record(training.text, training),
    }
    if request.select_data is None:
        refuse_duplicates(request.data, held_out, names_by_digest(training, records["training"]))
        if request.calib_data is None:
            refuse_duplicates(request.data, held_out, names_by_digest(calibration, records["calibration"]))
    for other in ("calibration", "training"):
        records["selection"].refuse_overlap(records[other], own_role="selection", other_role=other)
    if request.export.eval_data is not None:
        certified_images(request.export.eval_data, preprocessing, classes, records)
    check_fitness(request.fitness, TimmImages(at_most(selection.text, SEARCH_IMAGES), preprocessing), model.module)
    check_training(model, request.training(request.settings.epochs))
    if request.finetune_epochs:
        request.training(request.finetune_epochs)
    return cost


def _names_of_chosen_by(selection: str, preprocessing: Preprocessing) -> dict[str, str]:
    """The images that filtering and the search take of the selection images: names by digest."""
    names: dict[str, str] = {}
    for limit in (FILTER_IMAGES, SEARCH_IMAGES):
        images = TimmImages(at_most(selection, limit), preprocessing)
        names |= names_by_digest(images, images.record())
    return names
