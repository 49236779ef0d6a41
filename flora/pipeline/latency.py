"""Measuring a latency table: every shape of a model's linear layers at several ranks, and a few whole models."""

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch

from export.graphs import linear_sites
from export.latency import settled_ms
from export.onnx import onnx_from_module
from export.runtimes import ORT_CPU, TORCH, TORCH_CUDA, runtime_called, runtime_version
from flora.artifact import Document
from flora.errors import BackendMissingError, FloraError, InputError
from flora.lowrank.checkpoint import LoadedModel
from flora.lowrank.targets import find_targets, trace_cost
from flora.pipeline.job import OnStart
from flora.pipeline.subjects import Graphs, Modules, Subjects
from flora.provenance import clocks, device_facts, gpu_facts, now
from flora.ranks.cost import ModelCost, Rank, break_even_rank
from flora.ranks.latency import LatencyTable, ModelLatency, Site, SiteLatency
from flora.resume import Job, WorkFolder

MEASURED = "measured.json"
DENSE = "dense.onnx"
RANDOM_MODELS = 2
# Vectors of current processors hold 16 numbers in single precision.
RANK_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class LatencyRequest:
    """What to measure: `points` ranks of each shape, at each batch size and precision; at most for `minutes`.

    One that `forgets` throws away what an unfinished measurement with other settings has left.
    """

    layers: tuple[str, ...]
    runtime: str = ORT_CPU
    batches: tuple[int, ...] = (1, 8)
    precisions: tuple[str, ...] = ("fp32",)
    threads: int = 1
    points: int = 8
    minutes: float | None = None
    restart: bool = False
    forgets: bool = False

    def __post_init__(self) -> None:
        allowed = runtime_called(self.runtime).precisions
        if not allowed:
            raise InputError(f"Single layers are not measured on {self.runtime}; flora bench times whole models on it.")
        if not self.precisions or not set(self.precisions) <= set(allowed):
            given = ", ".join(self.precisions) or "none"
            raise InputError(f"{self.runtime} is measured in {' and '.join(allowed)}, given: {given}.")
        if not self.batches or min(self.batches) < 1:
            raise InputError(f"Batch sizes are at least 1, given: {', '.join(map(str, self.batches)) or 'none'}.")
        if self.points < 2 or self.threads < 1:
            raise InputError(f"At least 2 points and 1 thread are needed, got {self.points} and {self.threads}.")
        if self.minutes is not None and self.minutes <= 0:
            raise InputError(f"Minutes to measure for must be more than 0, got {self.minutes:g}.")

    @property
    def conditions(self) -> list[tuple[int, str]]:
        return [(batch, precision) for batch in self.batches for precision in self.precisions]

    @property
    def device_facts(self) -> dict[str, str]:
        """The device that a table must have been measured on to be used."""
        return device_facts() | (gpu_facts() if runtime_called(self.runtime).on_gpu else {})

    @property
    def runtime_facts(self) -> dict[str, str]:
        """What a table must have been measured with to be used; `BackendMissingError` without the runtime."""
        package, version = runtime_version(self.runtime)
        return {"runtime": self.runtime, package: version, "threads": str(self.threads)}


def load_table(file: Path, model: str, cost: ModelCost, request: LatencyRequest | None = None) -> LatencyTable:
    """The table in `file`; `InputError` unless it is of this model and device, and of the runtime of `request`.

    Without a request it must be of the runtime that it names itself, in the version that is installed here; its threads
    are as many as it says.
    """
    table = LatencyTable.load(file)
    if request is None:
        request = LatencyRequest(layers=(), runtime=table.runtime.get("runtime", ""))
        runtime = request.runtime_facts | {"threads": table.runtime.get("threads", "")}
    else:
        runtime = request.runtime_facts
    table.check(model=model, layers=cost.shapes, device=request.device_facts, runtime=runtime)
    return table


class _Measured(Document):
    """What an unfinished table has: results as they were timed, each with the reference's time beside it."""

    sites: tuple[tuple[float, SiteLatency], ...] = ()
    models: tuple[tuple[float, tuple[ModelLatency, ...]], ...] = ()


def measure_latency(
    model: LoadedModel,
    out: Path,
    request: LatencyRequest,
    *,
    on_start: OnStart = lambda done: None,
    on_group: Callable[[int, int, str], None] = lambda done, of, what: None,
) -> LatencyTable:
    """Measure and write the file `out`; stopped, the same call goes on. `on_group` gets what is done, of how many.

    No group is begun after the minutes of the request: `FloraError`. Beside each group of graphs one and the same
    reference is timed: by it all are brought to one speed of the device.
    """
    if model.config.ranks:
        raise InputError(f"{model.folder} is factorized already; measure the dense model.")
    settings = model.config.preprocessing
    cost = trace_cost(model.module, find_targets(model.module, request.layers), settings.input_size)
    started = time.monotonic()
    device, runtime = request.device_facts, request.runtime_facts
    known = _existing(out, request, model.config.model, cost, device, runtime)
    on_start(known is not None)
    if known is not None:
        return known
    job = Job(
        settings={
            "model": model.config.model,
            "args": model.config.args,
            "layers": [layer.name for layer in cost.layers],
            "conditions": request.conditions,
            "points": request.points,
            "forms": ("dense", "two factors", "pivoted"),
            **device,
            **runtime,
        }
    )
    if request.runtime == TORCH_CUDA and not torch.cuda.is_available():
        raise BackendMissingError("torch finds no GPU here; measure for the runtime torch, or on another machine.")
    if request.runtime in (TORCH, TORCH_CUDA) and torch.get_num_threads() != request.threads:
        raise InputError(
            f"torch runs {torch.get_num_threads()} threads, the table is to be for {request.threads}; set them by "
            "torch.set_num_threads."
        )
    work = WorkFolder.of(out)
    work.open(job, restart=request.restart or (request.forgets and not job.is_in(work.path)))
    dense = work.file(DENSE)
    if not dense.is_file():
        onnx_from_module(model.module, dense, preprocessing=settings, max_batch=max(64, *request.batches))
    graph = onnx.load(dense)
    by_site: dict[Site, list[str]] = {}
    for name, site in linear_sites(graph, cost.shapes).items():
        by_site.setdefault(site, []).append(name)
    progress = work.file(MEASURED)
    measured = _Measured.load(progress) if progress.is_file() else _Measured()
    groups = [(condition, site) for condition in request.conditions for site in by_site]
    total = len(groups) + len(request.conditions)
    subjects: Subjects = (
        Modules(model.module, cost, runtime=request.runtime)
        if request.runtime in (TORCH, TORCH_CUDA)
        else Graphs(graph, cost, work.path, runtime=request.runtime, threads=request.threads)
    )
    timing = _Timing(subjects, cost, request.points, next(iter(by_site)))

    def begin_group(what: object, condition: tuple[int, str]) -> None:
        done = len(measured.sites) + len(measured.models)
        if request.minutes is not None and time.monotonic() - started > 60 * request.minutes:
            raise FloraError(
                f"After {request.minutes:g} minutes {done} of {total} groups are measured. The same command goes on "
                "with the others."
            )
        on_group(done, total, f"{what}, batch {condition[0]}, {condition[1]}")

    for condition, site in groups[len(measured.sites) :]:
        begin_group(site, condition)
        found = timing.site(site, tuple(by_site[site]), *condition)
        measured = measured.model_copy(update={"sites": (*measured.sites, found)})
        measured.save(progress)
    for condition in request.conditions[len(measured.models) :]:
        begin_group("whole models", condition)
        whole = timing.models(settings.input_size, *condition)
        measured = measured.model_copy(update={"models": (*measured.models, whole)})
        measured.save(progress)
    sites, models = _at_one_speed(measured, request.conditions)
    table = LatencyTable(
        model=model.config.model,
        device=device,
        runtime=runtime,
        clocks=clocks(),
        sites=sites,
        models=models,
        created=now(),
    )
    table.save(out)
    work.remove()
    return table


def _existing(
    out: Path, request: LatencyRequest, model: str, cost: ModelCost, device: dict[str, str], runtime: dict[str, str]
) -> LatencyTable | None:
    """The table `out` where it holds what is asked for; `InputError` where another file is in its place."""
    if not Path(out).exists():
        return None
    try:
        table = LatencyTable.load(out)
    except InputError as error:
        raise InputError(f"{error} It is not replaced: give another file to write, or remove it.") from error
    try:
        table.check(model=model, layers=cost.shapes, device=device, runtime=runtime)
    except InputError:
        return None
    covered = set(request.conditions) <= set(table.conditions)
    return table if covered and not request.restart else None


@dataclass(frozen=True)
class _Timing:
    """Times what the subjects open, beside one and the same reference."""

    subjects: Subjects
    cost: ModelCost
    points: int
    reference: Site

    def site(self, site: Site, layers: tuple[str, ...], batch: int, precision: str) -> tuple[float, SiteLatency]:
        """The reference's milliseconds, and the site dense and at its ranks."""
        ranks, pivoted_ranks = _measured_ranks(site, self.points), _pivoted_ranks(site, self.points)
        with ExitStack() as opened:
            opened_call = partial(self._call, opened, batch=batch, precision=precision)
            calls = [
                opened_call(self.reference, "dense"),
                opened_call(site, "dense"),
                *(opened_call(site, rank) for rank in ranks),
                *(opened_call(site, rank, pivoted=True) for rank in pivoted_ranks),
            ]
            settled = settled_ms(calls, what=f"{site}, batch {batch} in {precision}")
        reference, dense_ms, *by_rank = settled.medians_ms
        return reference, SiteLatency(
            site=site,
            layers=layers,
            batch=batch,
            precision=precision,
            dense_ms=dense_ms,
            ranks=ranks,
            ms=tuple(by_rank[: len(ranks)]),
            pivoted_ranks=pivoted_ranks,
            pivoted_ms=tuple(by_rank[len(ranks) :]),
            spread=max(settled.spreads),
        )

    def models(self, size: tuple[int, int, int], batch: int, precision: str) -> tuple[float, tuple[ModelLatency, ...]]:
        """The reference's milliseconds, and those of whole models."""
        images = _numbers((batch, *size))
        configs = _calibration_configs(self.cost)
        with ExitStack() as opened:
            calls = [
                opened.enter_context(self.subjects.model(ranks, pivoted, batch, precision)).bind(images)
                for ranks, pivoted in configs.values()
            ]
            calls.append(self._call(opened, self.reference, "dense", batch=batch, precision=precision))
            settled = settled_ms(calls, what=f"whole models, batch {batch} in {precision}")
        *times, reference = settled.medians_ms
        return reference, tuple(
            ModelLatency(name=name, ranks=ranks, pivoted=pivoted, batch=batch, precision=precision, ms=ms)
            for (name, (ranks, pivoted)), ms in zip(configs.items(), times, strict=True)
        )

    def _call(
        self, opened: ExitStack, site: Site, rank: Rank, *, batch: int, precision: str, pivoted: bool = False
    ) -> Callable[[], object]:
        runner = opened.enter_context(self.subjects.layer(site, rank, batch, precision, pivoted=pivoted))
        return runner.bind(_numbers((batch, site.tokens, site.in_features)))


def _numbers(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _measured_ranks(site: Site, points: int) -> tuple[int, ...]:
    """So many ranks, the last where two factors have as many MACs as the dense layer; below on a grid if many."""
    top = break_even_rank(site.in_features, site.out_features)
    step = _grid(top, points)
    below = {max(step, int(rank) // step * step) for rank in np.linspace(step, top, points)[:-1]}
    return (*sorted(below - {top}), top)


def _grid(top: int, points: int) -> int:
    """The multiple that measured ranks are of: between others, kernels are slower by steps that no line follows."""
    return RANK_MULTIPLE if top >= RANK_MULTIPLE * points else 1


def _pivoted_ranks(site: Site, points: int) -> tuple[int, ...]:
    """Half as many ranks, from a quarter of the full one on: below, there is nothing to win."""
    full = site.full_rank
    step = _grid(full, points)
    shares = np.linspace(0.25, 1, max(2, points // 2))
    return tuple(sorted({min(full - step, max(step, int(share * full) // step * step)) for share in shares} - {0}))


def _calibration_configs(cost: ModelCost) -> dict[str, tuple[dict[str, Rank], tuple[str, ...]]]:
    """Ranks of the whole models that are measured, and the pivoted layers: from end to end, mixed, and all pivoted."""
    configs: dict[str, tuple[dict[str, Rank], tuple[str, ...]]] = {"dense": (cost.dense_ranks, ())}
    for name, share in (("eighth", 8), ("half", 2)):
        configs[name] = {layer.name: max(1, layer.break_even_rank // share) for layer in cost.layers}, ()
    for seed in range(RANDOM_MODELS):
        draw = random.Random(seed)
        mixed = {layer.name: draw.choice(["dense", *range(1, layer.break_even_rank)]) for layer in cost.layers}
        configs[f"mixed {seed + 1}"] = mixed, ()
    pivoted: dict[str, Rank] = {layer.name: max(1, layer.full_rank // 2) for layer in cost.layers}
    configs["pivoted"] = pivoted, tuple(layer.name for layer in cost.layers if layer.full_rank > 1)
    return configs


def _at_one_speed(
    measured: _Measured, conditions: list[tuple[int, str]]
) -> tuple[tuple[SiteLatency, ...], tuple[ModelLatency, ...]]:
    """All times as they were if the reference had always taken its median time."""
    sites: list[SiteLatency] = []
    models: list[ModelLatency] = []
    for condition, (beside, whole) in zip(conditions, measured.models, strict=True):
        group = [(ms, one) for ms, one in measured.sites if (one.batch, one.precision) == condition]
        usual = float(np.median([ms for ms, _ in group]))
        for ms, one in group:
            speed = usual / ms
            times = {name: tuple(ms * speed for ms in getattr(one, name)) for name in ("ms", "pivoted_ms")}
            sites.append(one.model_copy(update={"dense_ms": one.dense_ms * speed, **times}))
        models += [one.model_copy(update={"ms": one.ms * usual / beside}) for one in whole]
    return tuple(sites), tuple(models)
