"""From a trained model and a budget to a verified bundle: the paper's road as one resumable chain.

What the steps make lies in `OUT.work` and stays there: the trained supernet holds every other budget, too. A step
whose folder is complete is not done again.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from export.bundle import MANIFEST, Bundle, load_bundle
from flora.artifact import check_replaceable
from flora.errors import InputError
from flora.imagesets import ImageSetSpec
from flora.lowrank.checkpoint import (
    MODEL_CONFIG,
    SUPERNET_CONFIG,
    LoadedModel,
    load_model_folder,
    load_supernet,
    save_model,
)
from flora.lowrank.targets import find_targets, trace_cost
from flora.pipeline.build import build
from flora.pipeline.compact import chosen_ranks, compact_from_supernet
from flora.pipeline.export import ExportRequest, export_bundle
from flora.pipeline.filter import FilterRequest, filter_space
from flora.pipeline.images import training_record
from flora.pipeline.search import PARETO, SearchRequest, budget_slug, search
from flora.pipeline.train import TrainRequest, train
from flora.ranks.budget import Budget, check_reachable
from flora.ranks.evolution import SearchSettings
from flora.ranks.space import space_from_text
from flora.resume import WorkFolder
from flora.training.data import TimmImages
from flora.training.processes import is_main, processes, wait
from flora.training.selection import Fitness
from flora.training.settings import TrainingSettings
from flora.training.train import images_per_pass

CALIBRATION_IMAGES = 512
HELD_OUT = "1/10"


@dataclass(frozen=True, kw_only=True)
class CompressRequest:
    """`data` is trained on; without `select_data` every tenth image of it is held out to choose by instead.

    The supernet trains for the epochs of `settings`, the subnet that the search finds for `finetune_epochs` more.
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
    search: SearchSettings = field(default_factory=SearchSettings)
    teacher: str = "dense"
    device: torch.device | None = None
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
        calibration = self.calib_data or f"{training},limit={CALIBRATION_IMAGES}"
        return calibration, selection, training


def compress(
    model: LoadedModel,
    out: Path,
    request: CompressRequest,
    *,
    on_step: Callable[[str], None] = lambda step: None,
) -> Bundle:
    """Write the bundle `out`; stopped, the same call goes on with the step that was not finished."""
    check_replaceable(out, marker=MANIFEST)
    calibration, selection, training = request.image_sets
    processes(request.device)
    _refuse_early(model, request, (calibration, selection, training))
    settings: dict[str, Any] = {
        "model": str(model.folder or model.config.model),
        "images": [calibration, selection, training],
        "layers": list(request.layers),
        "space": request.space,
        "share": request.share,
        "training": request.settings.model_dump(),
        "finetune_epochs": request.finetune_epochs,
        "teacher": request.teacher,
        "fitness": request.fitness,
        "search": asdict(request.search),
    }
    if is_main():
        WorkFolder.open(out, settings, restart=request.restart)
    wait()
    work = WorkFolder.open(out, settings)
    device = request.device or torch.device("cpu")
    supernet, filtered, trained = map(work.file, ("supernet", "filtered", "trained"))
    found, compact, tuned = (
        work.file(f"{name}-{budget_slug(request.budget)}") for name in ("search", "compact", "finetuned")
    )

    def train_once(source: Path, out: Path, what: str, epochs: int) -> None:
        if _is_trained(out):
            return
        on_step(what)
        train(
            source,
            out,
            TrainRequest(
                data=training,
                settings=request.settings.with_epochs(epochs),
                teacher=request.teacher,
                device=device,
                workers=request.workers,
            ),
            on_step=lambda step, steps, loss: on_step(f"{what}: step {step} of {steps}, loss {loss:.3f}"),
        )

    if is_main() and not (supernet / SUPERNET_CONFIG).is_file():
        on_step("factorizing")
        model.module.to(device)
        build(
            model,
            supernet,
            data=calibration,
            layers=request.layers,
            space=request.space,
            workers=request.workers,
        )
    wait()
    if not (filtered / SUPERNET_CONFIG).is_file():
        on_step("filtering candidates")
        filter_space(
            supernet,
            filtered,
            FilterRequest(select_data=selection, share=request.share, device=device, workers=request.workers),
            on_block=lambda scores: on_step(f"filtering candidates: {scores.block}"),
        )
    train_once(filtered, trained, "training the supernet", request.settings.epochs)
    if not (found / PARETO).is_file():
        on_step("searching")
        search(
            trained,
            found,
            SearchRequest(
                select_data=selection,
                budgets=(request.budget,),
                fitness=request.fitness,
                settings=request.search,
                device=device,
                workers=request.workers,
            ),
            on_generation=lambda state: on_step(f"searching: generation {state.generation}"),
        )
    if is_main() and not (compact / MODEL_CONFIG).is_file():
        on_step("materializing")
        source = load_supernet(trained)
        ranks = chosen_ranks(source, file=found / "ranks.json")
        cut = compact_from_supernet(source, ranks)
        save_model(compact, cut.module, cut.config, ranks=ranks)
    wait()
    if request.finetune_epochs:
        train_once(compact, tuned, "fine-tuning", request.finetune_epochs)
        compact = tuned
    if is_main():
        export_bundle(load_model_folder(compact), request.export, out, on_step=on_step)
    wait()
    return load_bundle(out)


def _is_trained(folder: Path) -> bool:
    """Whether `folder` holds a supernet or a model, which `train` writes whole or not at all."""
    return any((folder / name).is_file() for name in (SUPERNET_CONFIG, MODEL_CONFIG))


def _refuse_early(model: LoadedModel, request: CompressRequest, image_sets: tuple[str, ...]) -> None:
    """Raise `InputError` for what a later step would refuse after hours: the budget, images, overlap, engines."""
    if model.config.ranks:
        raise InputError(f"{model.folder} is factorized already; compress the dense model.")
    preprocessing = model.config.preprocessing
    cost = trace_cost(model.module, find_targets(model.module, request.layers), preprocessing.input_size)
    space = space_from_text(request.space, cost)
    for index in range(len(space.blocks)):
        space.block_candidates(index)
    check_reachable(Budget.parse(request.budget, cost), space, cost)
    request.export.engine_specs()
    if request.finetune_epochs:
        request.settings.with_epochs(request.finetune_epochs)
    evaluation = TimmImages(request.export.eval_data, preprocessing).record()
    for role, text in zip(("calibration", "selection", "training"), image_sets, strict=True):
        images = TimmImages(text, preprocessing)
        record = training_record(text, images) if role == "training" else images.record()
        evaluation.refuse_overlap(record, own_role="evaluation", other_role=role)
        if role == "training":
            images_per_pass(request.settings, len(images), processes().num_processes)
