"""Ranks without training: probe every layer of a supernet once, then allocate within any budget."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from flora.artifact import Document, check_replaceable, new_folder
from flora.errors import InputError
from flora.imagesets import ImageSetRecord
from flora.lowrank.checkpoint import LoadedSupernet, content_digest, load_supernet
from flora.pipeline.compact import config_within
from flora.pipeline.images import identity
from flora.pipeline.job import OnStart, begin
from flora.ranks.allocate import allocate
from flora.ranks.budget import Budget, LatencyBudget, Limit, check_reachable
from flora.ranks.config import RankConfig
from flora.ranks.latency import LatencyTable
from flora.ranks.sensitivity import AdditiveModel, LayerSensitivity
from flora.ranks.space import SearchSpace
from flora.resume import SETTINGS, Job
from flora.training.data import TimmImages
from flora.training.processes import is_main, processes, wait
from flora.training.selection import SelectionImages
from flora.training.sensitivity import probe_layers

SENSITIVITY = "sensitivity.json"
CPU = torch.device("cpu")


class SensitivityReport(Document):
    """`sensitivity.json`: the probe of every layer, and the images that they were measured on."""

    kind: Literal["flora sensitivity"] = "flora sensitivity"
    probes: dict[str, LayerSensitivity]
    selection: ImageSetRecord


@dataclass(frozen=True, kw_only=True)
class SensitivityRequest:
    """What to probe on; labels are not needed."""

    select_data: str
    device: torch.device = CPU
    workers: int = 0


def measure_sensitivity(
    source: Path,
    out: Path,
    request: SensitivityRequest,
    *,
    on_start: OnStart = lambda done: None,
    on_layers: Callable[[int, int], None] = lambda done, layers: None,
) -> SensitivityReport:
    """Probe the supernet in folder `source` and write the folder `out`; stopped, the same call goes on.

    `on_layers` gets how many layers are probed, of how many.
    """
    check_replaceable(out, marker=SENSITIVITY)
    supernet = load_supernet(source)
    config = supernet.config
    processes(request.device)
    images = TimmImages(request.select_data, config.preprocessing, workers=request.workers)
    record = images.record()
    for role in ("calibration", "training"):
        if role in config.image_sets:
            record.refuse_overlap(config.image_sets[role], own_role="selection", other_role=role)
    job = Job(settings={"source": content_digest(source), "selection": identity(images, record)})
    work = begin(job, out, restart=False, on_start=on_start)
    if work is None:
        return SensitivityReport.load(out / SENSITIVITY)
    measured = work.file(SENSITIVITY)

    def note(probes: dict[str, LayerSensitivity]) -> None:
        if is_main():
            SensitivityReport(probes=probes, selection=record).save(measured)
        wait()
        on_layers(len(probes), len(config.layers))

    probes = probe_layers(
        supernet.module.to(request.device),
        supernet.load_dense().module.to(request.device),
        config.cost,
        SelectionImages(images),
        known=SensitivityReport.load(measured).probes if measured.is_file() else {},
        on_layers=note,
    )
    report = SensitivityReport(probes=probes, selection=record)
    if is_main():
        with new_folder(out, marker=SENSITIVITY) as folder:
            job.save(folder / SETTINGS)
            report.save(folder / SENSITIVITY)
        work.remove()
    wait()
    return report


def allocated_ranks(
    supernet: LoadedSupernet,
    report: SensitivityReport,
    budget: str,
    table: LatencyTable | None = None,
    *,
    space: SearchSpace | None = None,
) -> RankConfig:
    """The ranks of least predicted divergence within `budget` (as the user writes it: `macs=50%`).

    With a latency table that budget may be one in milliseconds. `space` takes the place of the supernet's own.
    """
    config = supernet.config
    if config.method == "released":
        raise InputError(
            f"{supernet.folder} was imported and holds no spectra to allocate by; search it, or build from the dense "
            "model."
        )
    limit = LatencyBudget.parse(budget, table) if table else Budget.parse(budget, config.cost)
    return allocated_config(supernet, report, additive_model(supernet, report), limit, space or config.space)


def additive_model(supernet: LoadedSupernet, report: SensitivityReport) -> AdditiveModel:
    """The error of the supernet's subnets as a sum over layers."""
    return AdditiveModel({name: layer.spectrum for name, layer in supernet.config.layers.items()}, report.probes)


def allocated_config(
    supernet: LoadedSupernet, report: SensitivityReport, model: AdditiveModel, limit: Limit, space: SearchSpace
) -> RankConfig:
    """The ranks of `space` of least error by `model` within `limit`, which must be within reach."""
    config = supernet.config
    check_reachable(limit, space, config.cost)
    ranks = allocate(model.choices(space, config.cost, limit), limit.left_for_layers(config.cost))
    assert ranks is not None
    origin = f"allocated by sensitivity, predicted divergence {model.error(ranks):.3g} nats"
    return config_within(config, ranks, limit, origin=origin, selection=report.selection)
