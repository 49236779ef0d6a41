"""From a trained model and a budget to a verified bundle in minutes, without training.

What the steps make lies in `OUT.work` and stays there. As in make, a step is done again only where what it comes from
or its settings have changed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from export.bundle import MANIFEST, Bundle, load_bundle
from flora.artifact import check_replaceable
from flora.lowrank.checkpoint import LoadedModel, load_supernet
from flora.pipeline.build import build
from flora.pipeline.compact import materialize_job, with_reference_of
from flora.pipeline.compensate import compensate_job
from flora.pipeline.drop import ranks_within_drop
from flora.pipeline.export import export_job
from flora.pipeline.export_request import ExportRequest
from flora.pipeline.images import calibration_and_selection, certified_images, names_by_digest, refuse_duplicates
from flora.pipeline.job import OnStart, folder_of_steps, forget_unfinished
from flora.pipeline.latency import RANK_MULTIPLE, LatencyRequest
from flora.pipeline.precision import refuse_streamed
from flora.pipeline.search import budget_slug
from flora.pipeline.sensitivity import SensitivityRequest, allocated_ranks, measure_sensitivity
from flora.pipeline.timed import check_budget, latency_request, table_of, timed_export
from flora.ranks.budget import asks_for_drop
from flora.ranks.cost import ModelCost
from flora.ranks.space import SearchSpace, space_from_multiples, space_from_text
from flora.training.data import TimmImages
from flora.training.processes import is_main, processes, wait

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class TrainingFreeRequest:
    """`calib_data` needs no labels; without `select_data` every fourth image of it is held out to choose by.

    A budget in milliseconds goes by `latency_table`, or by one that is measured here, for the runtime of `export`.
    Without a `space` ranks are multiples of 8, of those for time every second one, which kernels run fastest.
    """

    calib_data: str
    budget: str
    export: ExportRequest
    select_data: str | None = None
    latency_table: Path | None = None
    layers: tuple[str, ...]
    space: str | None = None
    device: torch.device = CPU
    workers: int = 0
    restart: bool = False

    @property
    def image_sets(self) -> tuple[str, str]:
        """Calibration and selection images: two parts of `calib_data` where the second is not given."""
        return calibration_and_selection(self.calib_data, self.select_data)

    def space_of(self, cost: ModelCost) -> SearchSpace:
        """What ranks are chosen from; ranks above break-even are for the pivoted form."""
        if self.space is not None or self.latency is None:
            return space_from_text(self.built_space, cost, keep_redundant=True)
        return space_from_multiples(cost, RANK_MULTIPLE, keep_redundant=True)

    @property
    def built_space(self) -> str:
        """The supernet's own, which does not depend on the budget."""
        return self.space or "multiples=8"

    @property
    def latency(self) -> LatencyRequest | None:
        """The measurement that a budget in milliseconds or points goes by; None for another budget."""
        return latency_request(self.budget, self.layers, self.export)


def compress_training_free(
    model: LoadedModel,
    out: Path,
    request: TrainingFreeRequest,
    *,
    on_start: OnStart = lambda done: None,
    on_step: Callable[[str], None] = lambda step: None,
    steps: Path | None = None,
) -> Bundle:
    """Write the bundle `out`; stopped, the same call goes on with the step that was not finished.

    `on_start` is told whether the bundle is there already, when the steps before it are done. These lie in the folder
    `steps`, by default in `OUT.work`.
    """
    check_replaceable(out, marker=MANIFEST)
    calibration, selection = request.image_sets
    processes(request.device)
    steps = steps or folder_of_steps(out)
    cost = refuse_early(model, request)
    supernet, probed = steps / "supernet", steps / "sensitivity"
    compact, compensated = (steps / f"{name}-{budget_slug(request.budget)}" for name in ("compact", "compensated"))
    if request.restart:
        forget_unfinished(probed)

    def begins(what: str) -> OnStart:
        return lambda done: None if done else on_step(what)

    table, _ = table_of(model, cost, request, steps, on_step)
    if is_main():
        model.module.to(request.device)
        build(
            model,
            supernet,
            data=calibration,
            layers=request.layers,
            space=request.built_space,
            keep_redundant=True,  # at such ranks the pivoted form may still be faster than the dense layer
            workers=request.workers,
            on_start=begins("factorizing"),
        )
    wait()
    report = measure_sensitivity(
        supernet,
        probed,
        SensitivityRequest(select_data=selection, device=request.device, workers=request.workers),
        on_start=begins("probing layers"),
        on_layers=lambda done, layers: on_step(f"probing layers: {done} of {layers}"),
    )
    if asks_for_drop(request.budget):
        assert table is not None
        ranks = ranks_within_drop(
            *(supernet, report, table, steps / f"ranks-{budget_slug(request.budget)}"),
            space=request.space_of(cost),
            budget=request.budget,
            select_data=selection,
            device=request.device,
            workers=request.workers,
            on_start=begins("trying budgets"),
            on_try=lambda line: on_step(f"trying budgets: {line}"),
        )
    else:
        ranks = allocated_ranks(load_supernet(supernet), report, request.budget, table, space=request.space_of(cost))
    materialize_job(supernet, ranks, compact, on_start=begins("materializing"))
    shipped = compact
    if not TimmImages(calibration, model.config.preprocessing).is_streamed:
        shipped = compensated
        compensate_job(
            compact,
            compensated,
            calib_data=calibration,
            select_data=selection,
            device=request.device,
            workers=request.workers,
            on_start=begins("compensating"),
            on_layer=lambda done, layers: on_step(f"compensating: {done} of {layers} layers"),
        )
    if is_main():
        export = replace(request.export.made_with(calibration, selection), probes=report.probes)
        export = timed_export(export, request.latency, ranks, table)
        export_job(with_reference_of(compact, shipped), export, out, on_start=on_start, on_step=on_step)
    wait()
    return load_bundle(out)


def refuse_early(model: LoadedModel, request: TrainingFreeRequest) -> ModelCost:
    """The model's cost; `InputError` for what a later step would refuse after minutes: budget, engines, images."""
    cost, preprocessing = check_budget(model, request), model.config.preprocessing
    request.export.engine_specs()
    parts = [TimmImages(text, preprocessing) for text in request.image_sets]
    if request.export.low_precisions:
        refuse_streamed(parts[0], request.calib_data)
    calibration, selection = (part.record() for part in parts)
    if request.select_data is None:
        refuse_duplicates(
            request.calib_data, names_by_digest(parts[1], selection), names_by_digest(parts[0], calibration)
        )
    selection.refuse_overlap(calibration, own_role="selection", other_role="calibration")
    if request.export.eval_data is not None:
        classes, seen = cast(int, model.module.num_classes), {"calibration": calibration, "selection": selection}
        certified_images(request.export.eval_data, preprocessing, classes, seen)
    return cost
