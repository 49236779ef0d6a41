"""The fastest ranks that lose no more than so many points on the selection images: a budget of accuracy."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from flora.artifact import check_replaceable, new_folder
from flora.lowrank.checkpoint import RANK_CONFIG, content_digest, load_supernet
from flora.lowrank.supernet import active_ranks
from flora.pipeline.images import identity, open_images
from flora.pipeline.job import OnStart
from flora.pipeline.sensitivity import SensitivityReport, additive_model, allocated_config
from flora.ranks.budget import LatencyBudget, drop_parts
from flora.ranks.config import RankConfig
from flora.ranks.latency import LatencyModel, LatencyTable
from flora.ranks.space import SearchSpace
from flora.resume import SETTINGS, Job
from flora.training.data import TimmImages
from flora.training.processes import is_main, wait
from flora.training.selection import SelectionImages, log_probabilities

# So often is the interval halved that the latency lies in.
HALVINGS = 8


def ranks_within_drop(
    source: Path,
    report: SensitivityReport,
    table: LatencyTable,
    out: Path,
    *,
    space: SearchSpace,
    budget: str,
    select_data: str,
    device: torch.device,
    workers: int = 0,
    on_start: OnStart = lambda done: None,
    on_try: Callable[[str], None] = lambda line: None,
) -> RankConfig:
    """The ranks of the supernet in folder `source` for `budget` (`drop=0.5`), kept in the folder `out`.

    The interval of latencies is halved; ranks for each are allocated. Points are of top-1 or, where the images are not
    labelled with the model's classes, of agreement with the dense model. `on_try` gets a line on each model.
    """
    check_replaceable(out, marker=RANK_CONFIG)
    points, batch = drop_parts(budget)
    supernet = load_supernet(source)
    config = supernet.config
    images = TimmImages(select_data, config.preprocessing, workers=workers)
    probes = {name: probe.model_dump() for name, probe in report.probes.items()}
    job = Job(
        settings={
            "source": content_digest(source),
            "selection": identity(images, images.record()),
            "table": table.digest,
            "probes": probes,
            "space": space.model_dump(mode="json"),
            "budget": budget,
        }
    )
    done = job.is_in(out)
    on_start(done)
    if is_main() and not done:
        dense = supernet.load_dense().module
        labelled = _are_labels(images, cast(int, dense.num_classes))
        judge = _Judge(SelectionImages(images), dense.to(device), labelled=labelled)
        module, model = supernet.module.to(device), additive_model(supernet, report)
        latency = LatencyModel(table, batch=batch)

        def tried(share: float) -> tuple[RankConfig, bool]:
            limit = LatencyBudget(
                limit=math.ceil(share * latency.ns({})), text=f"latency={share:.4g}x", latency=latency
            )
            ranks = allocated_config(supernet, report, model, limit, space)
            with active_ranks(module, ranks.ranks):
                drop = judge.drop(module)
            on_try(f"{share:.2f} of the dense latency costs {drop:.2f} points of {judge.what}")
            origin = f"{ranks.origin}, {drop:.2f} points of {judge.what} lost on {len(images)} selection images"
            return ranks.model_copy(update={"budget": budget, "origin": origin}), drop <= points

        dense_ns = latency.ns({})
        whole = LatencyBudget(limit=dense_ns, text=budget, latency=latency)
        low, high = whole.cost_of(config.cost, whole.cheapest(space, config.cost)) / dense_ns, 1.0
        found, enough = tried(low)
        for _ in range(0 if enough else HALVINGS):
            middle = (low + high) / 2
            ranks, fits = tried(middle)
            if fits:
                found, enough, high = ranks, True, middle
            else:
                low = middle
        if not enough:
            cost, dense_ranks = config.cost, config.cost.dense_ranks
            changes = {"ranks": dense_ranks, "pivoted": (), "macs": cost.dense_macs, "params": cost.dense_params}
            origin = f"no faster model lost at most {points:g} points of {judge.what}"
            found = found.model_copy(update=changes | {"latency_ms": latency.dense_ms, "origin": origin})
        with new_folder(out, marker=RANK_CONFIG) as folder:
            job.save(folder / SETTINGS)
            found.save(folder / RANK_CONFIG)
    wait()
    return RankConfig.load(out / RANK_CONFIG)


def _are_labels(images: TimmImages, classes: int) -> bool:
    """Whether the images are labelled with the model's classes: calibration images may lie in any folders."""
    labels, named = images.labels(), len(getattr(open_images(images.text, images.preprocessing), "class_names", ()))
    return bool(((labels >= 0) & (labels < classes)).all()) and named in (0, classes)


class _Judge:
    """Points that a model loses against the dense one: of top-1 with labels, of agreement without."""

    def __init__(self, images: SelectionImages, dense: torch.nn.Module, *, labelled: bool) -> None:
        self._images = images
        labels = torch.cat([labels for _, labels in images.batches()])
        answers = log_probabilities(dense, images).argmax(1)
        self.what = "top-1" if labelled else "agreement"
        self._wanted = labels if labelled else answers
        self._dense = self._points(answers)

    def drop(self, model: torch.nn.Module) -> float:
        return self._dense - self._points(log_probabilities(model, self._images).argmax(1))

    def _points(self, answers: torch.Tensor) -> float:
        return 100 * (answers == self._wanted).float().mean().item()
