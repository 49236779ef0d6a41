"""The fastest ranks that lose no more than so many points on the selection images: a budget of accuracy."""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from flora.artifact import check_replaceable, new_folder
from flora.lowrank.checkpoint import RANK_CONFIG, content_digest, load_supernet
from flora.lowrank.supernet import active_ranks
from flora.pipeline.images import identity
from flora.pipeline.job import OnStart
from flora.pipeline.sensitivity import SensitivityReport, additive_model, allocated_config
from flora.ranks.budget import LatencyBudget, drop_parts
from flora.ranks.config import RankConfig
from flora.ranks.latency import LatencyModel, LatencyTable
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
    budget: str,
    select_data: str,
    device: torch.device,
    workers: int = 0,
    on_start: OnStart = lambda done: None,
    on_try: Callable[[str], None] = lambda line: None,
) -> RankConfig:
    """The ranks of the supernet in folder `source` for `budget` (`drop=0.5`), kept in the folder `out`.

    The latency is halved in; ranks for each are allocated. Points are of top-1 or, where labels are missing, of
    agreement with the dense model. `on_try` gets a line on each model that was tried.
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
            "budget": budget,
        }
    )
    done = job.is_in(out)
    on_start(done)
    if is_main() and not done:
        judge = _Judge(SelectionImages(images), supernet.load_dense().module.to(device))
        module, model = supernet.module.to(device), additive_model(supernet, report)
        latency = LatencyModel(table, batch=batch)

        def tried(share: float) -> tuple[RankConfig, bool]:
            limit = LatencyBudget(
                limit=math.ceil(share * latency.ns({})), text=f"latency={share:.4g}x", latency=latency
            )
            ranks = allocated_config(supernet, report, model, limit)
            with active_ranks(module, ranks.ranks):
                drop = judge.drop(module)
            on_try(f"{share:.2f} of the dense latency costs {drop:.2f} points of {judge.what}")
            origin = f"{ranks.origin}, {drop:.2f} points of {judge.what} lost on {len(images)} selection images"
            return ranks.model_copy(update={"budget": budget, "origin": origin}), drop <= points

        dense_ns = latency.ns({})
        whole = LatencyBudget(limit=dense_ns, text=budget, latency=latency)
        low, high = whole.cost_of(config.cost, whole.cheapest(config.space, config.cost)) / dense_ns, 1.0
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


class _Judge:
    """Points that a model loses against the dense one."""

    def __init__(self, images: SelectionImages, dense: torch.nn.Module) -> None:
        self._images = images
        labels = torch.cat([labels for _, labels in images.batches()])
        answers = log_probabilities(dense, images).argmax(1)
        self.what = "top-1" if (labels >= 0).all() else "agreement"
        self._wanted = labels if self.what == "top-1" else answers
        self._dense = self._points(answers)

    def drop(self, model: torch.nn.Module) -> float:
        return self._dense - self._points(log_probabilities(model, self._images).argmax(1))

    def _points(self, answers: torch.Tensor) -> float:
        return 100 * (answers == self._wanted).float().mean().item()
