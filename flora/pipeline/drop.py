"""The fastest ranks that lose no more than so many points on the selection images: a budget of accuracy."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import nn

from flora.artifact import check_replaceable, new_folder
from flora.lowrank.checkpoint import RANK_CONFIG, content_digest, load_supernet
from flora.pipeline.images import identity, labels_are_classes, open_images
from flora.pipeline.job import OnStart
from flora.pipeline.sensitivity import SensitivityReport, additive_model, allocated_config
from flora.ranks.budget import LatencyBudget, drop_parts
from flora.ranks.config import RankConfig
from flora.ranks.latency import LatencyModel, LatencyTable
from flora.ranks.space import SearchSpace
from flora.resume import SETTINGS, Job
from flora.training.data import TimmImages
from flora.training.processes import is_main, wait
from flora.training.selection import Fitness, SelectionImages, SubnetScores, log_probabilities

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
    if done:
        return RankConfig.load(out / RANK_CONFIG)
    module, dense = supernet.module.to(device), supernet.load_dense().module.to(device)
    fitness: Fitness = (
        "top1"
        if labels_are_classes(open_images(select_data, config.preprocessing), cast(int, dense.num_classes))
        else "agreement"
    )
    what = {"top1": "top-1", "agreement": "agreement"}[fitness]
    selection = SelectionImages(images)
    scores = SubnetScores(module, selection, fitness=fitness, dense=dense)
    dense_right = _right(dense, selection) if fitness == "top1" else len(selection)
    model, latency = additive_model(supernet, report), LatencyModel(table, batch=batch)
    dense_ns = latency.ns({})

    def tried(share: float) -> tuple[RankConfig, bool]:
        limit = LatencyBudget(limit=math.ceil(share * dense_ns), text=budget, latency=latency)
        ranks = allocated_config(supernet, report, model, limit, space)
        (right,) = scores([ranks.ranks], 0, len(selection))
        drop = 100 * (dense_right - int(right.sum())) / len(selection)
        on_try(f"{share:.2f} of the dense latency costs {drop:.2f} points of {what}")
        origin = f"{ranks.origin}, {drop:.2f} points of {what} lost on {len(images)} selection images"
        return ranks.model_copy(update={"origin": origin}), drop <= points

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
        origin = f"no faster model lost at most {points:g} points of {what}"
        found = found.model_copy(update=changes | {"latency_ms": latency.dense_ms, "origin": origin})
    if is_main():
        with new_folder(out, marker=RANK_CONFIG) as folder:
            job.save(folder / SETTINGS)
            found.save(folder / RANK_CONFIG)
    wait()
    return found


def _right(model: nn.Module, images: SelectionImages) -> int:
    """How many of `images` the model classifies correctly."""
    labels = torch.cat([labels for _, labels in images.batches()])
    return int((log_probabilities(model, images).argmax(1) == labels).sum())
