"""From a trained model and a budget to a verified bundle in minutes, without training.

What the steps make lies in `OUT.work` and stays there. As in make, a step is done again only where what it comes from
or its settings have changed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from export.bundle import MANIFEST, Bundle, load_bundle
from flora.artifact import check_replaceable
from flora.errors import InputError
from flora.imagesets import ImageSetSpec
from flora.lowrank.checkpoint import LoadedModel, load_model_folder, load_supernet
from flora.lowrank.targets import find_targets, trace_cost
from flora.pipeline.build import build
from flora.pipeline.compact import materialize_job
from flora.pipeline.export import ExportRequest, export_job
from flora.pipeline.images import check_classes, names_by_digest, open_images, refuse_duplicates
from flora.pipeline.job import OnStart, folder_of_steps, forget_unfinished
from flora.pipeline.search import budget_slug
from flora.pipeline.sensitivity import SensitivityRequest, allocated_ranks, measure_sensitivity
from flora.ranks.budget import Budget, check_reachable
from flora.ranks.space import space_from_text
from flora.training.data import TimmImages
from flora.training.processes import is_main, processes, wait

HELD_OUT = "1/4"
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class TrainingFreeRequest:
    """`calib_data` needs no labels; without `select_data` every fourth image of it is held out to choose by."""

    calib_data: str
    budget: str
    export: ExportRequest
    select_data: str | None = None
    layers: tuple[str, ...]
    space: str
    device: torch.device = CPU
    workers: int = 0
    restart: bool = False

    @property
    def image_sets(self) -> tuple[str, str]:
        """Calibration and selection images: two parts of `calib_data` where the second is not given."""
        if self.select_data is not None:
            return self.calib_data, self.select_data
        spec = ImageSetSpec.parse(self.calib_data)
        if spec.fold or spec.left_out:
            raise InputError(f"{self.calib_data} is a part of a set already; say what to choose by with --select-data.")
        return f"{self.calib_data},except={HELD_OUT}", f"{self.calib_data},fold={HELD_OUT}"


def compress_training_free(
    model: LoadedModel,
    out: Path,
    request: TrainingFreeRequest,
    *,
    on_start: OnStart = lambda done: None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Bundle:
    """Write the bundle `out`; stopped, the same call goes on with the step that was not finished.

    `on_start` is told whether the bundle is there already, when the steps before it are done.
    """
    check_replaceable(out, marker=MANIFEST)
    calibration, selection = request.image_sets
    processes(request.device)
    steps = folder_of_steps(out)
    _refuse_early(model, request)
    supernet, probed = steps / "supernet", steps / "sensitivity"
    compact = steps / f"compact-{budget_slug(request.budget)}"
    if request.restart:
        forget_unfinished(probed)

    def begins(what: str) -> OnStart:
        return lambda done: None if done else on_step(what)

    if is_main():
        model.module.to(request.device)
        build(
            model,
            supernet,
            data=calibration,
            layers=request.layers,
            space=request.space,
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
    ranks = allocated_ranks(load_supernet(supernet), report, request.budget)
    materialize_job(supernet, ranks, compact, on_start=begins("materializing"))
    if is_main():
        export_job(load_model_folder(compact), request.export, out, on_start=on_start, on_step=on_step)
    wait()
    return load_bundle(out)


def _refuse_early(model: LoadedModel, request: TrainingFreeRequest) -> None:
    """Raise `InputError` for what a later step would refuse after minutes: budget, engines, images."""
    if model.config.ranks:
        raise InputError(f"{model.folder} is factorized already; compress the dense model.")
    preprocessing = model.config.preprocessing
    cost = trace_cost(model.module, find_targets(model.module, request.layers), preprocessing.input_size)
    check_reachable(Budget.parse(request.budget, cost), space_from_text(request.space, cost), cost)
    request.export.engine_specs()
    images = open_images(request.export.eval_data, preprocessing)
    check_classes(images, cast(int, model.module.num_classes))
    evaluation = images.record()
    parts = [TimmImages(text, preprocessing) for text in request.image_sets]
    calibration, selection = (part.record() for part in parts)
    if request.select_data is None:
        refuse_duplicates(
            request.calib_data, names_by_digest(parts[1], selection), names_by_digest(parts[0], calibration)
        )
    selection.refuse_overlap(calibration, own_role="selection", other_role="calibration")
    for role, seen in (("calibration", calibration), ("selection", selection)):
        evaluation.refuse_overlap(seen, own_role="evaluation", other_role=role)
