"""Timing the artefacts of a bundle together in one run, and the memory of each in a process of its own.

Needs no torch unless one of its runtimes is asked for.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from export.benchmark import LatencyStats
from export.bundle import GOLDEN, check_unaltered, load_bundle, read_golden
from export.latency import AGREEMENT, WINDOW, Call, Times, repeated_ms, spread_of
from export.memory import PeakMemory, can_measure, peak_memory
from export.runners import Runner
from flora.errors import BackendMissingError, FloraError, InputError
from flora.pipeline.bench_report import BenchReport, BenchRow
from flora.pipeline.bench_subjects import Subject, subjects_of
from flora.provenance import clocks, device_facts, gpu_facts, now, versions

# Repeats end where each ratio, and each median, is known so well: half its 95 % interval, relative to it.
RATIO_KNOWN, MEDIAN_KNOWN = 0.01, 0.02
# As many as a p99 needs, unless they take more than this share of the time allowed.
REPEATS, SHARE_OF_TIME = 100, 0.25


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What to time; `artifacts` are names or paths, all if none.

    At each batch at most for `seconds`, unless two windows of repeats take longer.
    """

    artifacts: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 8)
    threads: int = 1
    seconds: float = 30.0
    memory: bool = True

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise InputError(f"Batch sizes are at least 1, given: {', '.join(map(str, self.batches)) or 'none'}.")
        if self.threads < 1:
            raise InputError(f"At least 1 thread is needed, got {self.threads}.")
        if not self.seconds > 0:
            raise InputError(f"Seconds to measure for must be more than 0, got {self.seconds:g}.")


def bench_bundle(
    folder: Path, request: BenchRequest, *, on_step: Callable[[str], None] = lambda step: None
) -> BenchReport:
    """Time what the request names of the bundle, the artefacts interleaved in this process.

    `GateFailedError` where a file is not as it was exported, `InputError` for a batch that nothing takes,
    `BackendMissingError` where something that was named does not run here, or nothing does.
    """
    bundle = load_bundle(folder)
    check_unaltered(bundle)
    subjects, left_out = subjects_of(bundle, request.artifacts, request.runtimes, request.threads)
    golden, _ = read_golden(bundle.folder / GOLDEN)
    images = {batch: np.resize(golden, (batch, *golden.shape[1:])) for batch in sorted(set(request.batches))}
    rows: list[BenchRow] = []
    taken: dict[str, list[int]] = {}
    with ExitStack() as opened:
        runners = _opened(opened, subjects, left_out, on_step)
        for batch, array in images.items():
            on_step(f"timing batch {batch}")
            runnable = _that_take(runners, array, left_out)
            for subject, _ in runnable:
                taken.setdefault(subject.name, []).append(batch)
            rows += _timed_rows(runnable, array, request.seconds)
    memory: dict[tuple[str, int], PeakMemory] = {}
    if request.memory and can_measure():
        for subject in (one for one in subjects if one.name in taken):
            on_step(f"measuring memory: {subject.name}")
            arrays = [images[batch] for batch in taken[subject.name]]
            found = peak_memory(subject.opened, subject.library, arrays, what=subject.name, on_gpu=subject.on_gpu)
            memory |= {(subject.name, batch): one for batch, one in zip(taken[subject.name], found, strict=True)}
    named = {subject.name: subject for subject in subjects}
    return BenchReport(
        bundle=str(folder),
        model=bundle.manifest.model,
        created=now(),
        protocol=_protocol(request, measures_memory=bool(memory), on_gpu=any(named[one].on_gpu for one in taken)),
        device=device_facts() | gpu_facts() | clocks(),
        versions=versions(),
        rows=[row.model_copy(update={"memory": memory.get((row.name, row.latency.batch_size))}) for row in rows],
        left_out=left_out,
    )


def _opened(
    opened: ExitStack, subjects: Sequence[Subject], left_out: dict[str, str], on_step: Callable[[str], None]
) -> list[tuple[Subject, Runner]]:
    """Runners of all subjects that work here; the others are left out, unless somebody asked for them."""
    runners = []
    for subject in subjects:
        on_step(f"opening: {subject.name}")
        try:
            runners.append((subject, opened.enter_context(subject.opened())))
        except FloraError as error:
            if subject.asked:
                raise
            left_out[subject.name] = str(error)
    if not runners:
        raise BackendMissingError(f"Nothing runs here. {' '.join(left_out.values())}")
    return runners


def _that_take(
    runners: Sequence[tuple[Subject, Runner]], images: np.ndarray, left_out: dict[str, str]
) -> list[tuple[Subject, Runner]]:
    """Those that take this batch; `InputError` where none does."""
    taking = []
    reasons = {}
    for subject, runner in runners:
        try:
            runner(images)
            taking.append((subject, runner))
        except FloraError as error:
            reasons[f"{subject.name}, batch {len(images)}"] = str(error)
    if not taking:
        raise InputError(f"Nothing takes a batch of {len(images)}. {' '.join(reasons.values())}")
    left_out |= reasons
    return taking


def _timed_rows(runners: Sequence[tuple[Subject, Runner]], images: np.ndarray, seconds: float) -> list[BenchRow]:
    """A row for each runner at this batch, and on a GPU another with transfers; ratios are over the first like it."""
    calls: list[tuple[Subject, Runner, bool | None, Call]] = []
    for subject, runner in runners:
        calls.append((subject, runner, False if subject.on_gpu else None, runner.bind(images)))
        if subject.on_gpu:
            calls.append((subject, runner, True, partial(runner, images)))
    enough = partial(_is_enough, seconds=seconds)
    times = repeated_ms([call for *_, call in calls], enough=enough, seconds=seconds, leads=1)
    with_transfers = next((index for index, (*_, transfers, _) in enumerate(calls) if transfers), 0)
    return [
        _row(subject, runner, transfers, times, index, with_transfers if transfers else 0, len(images))
        for index, (subject, runner, transfers, _) in enumerate(calls)
    ]


def _is_enough(times_ms: np.ndarray, *, seconds: float) -> bool:
    """Whether times [calls, repeats], each after a run as long, say enough of medians and of ratios over the first."""
    if times_ms.shape[1] < REPEATS and 2 * times_ms.sum() < SHARE_OF_TIME * seconds * 1000:
        return False
    return all(_known(times, MEDIAN_KNOWN) and _known(times / times_ms[0], RATIO_KNOWN) for times in times_ms)


def _known(values: np.ndarray, share: float) -> bool:
    spread = spread_of(values)
    return spread is not None and spread <= share


def _row(
    subject: Subject, runner: Runner, transfers: bool | None, times: Times, index: int, first: int, batch_size: int
) -> BenchRow:
    return BenchRow(
        name=subject.name,
        artifact=subject.artifact,
        runtime=subject.runtime,
        provider=runner.provider,
        precision=subject.precision,
        status=subject.status,
        transfers=transfers,
        latency=LatencyStats.of(times.ms[index], times.ms[first], batch_size=batch_size, steady=times.steady),
        warm_up=times.discarded,
        memory=None,
    )


def _protocol(request: BenchRequest, *, measures_memory: bool, on_gpu: bool) -> dict[str, str]:
    timed = "one batch, from images in memory to logits in memory; reading and preprocessing are not timed"
    if on_gpu:
        timed += "; without transfers, images lie on the GPU and logits stay there, and the call waits for the end"
    memory = "not measured"
    if measures_memory:
        memory = (
            "a process of its own for each, which opens it and runs the batches, smallest first: the most that was "
            "resident up to a batch, and its growth beyond the runtime's libraries"
        )
        if on_gpu:
            memory += "; on a GPU by how much free memory sank, whoever took it"
    return {
        "timed": timed,
        "images": "the bundle's golden images, repeated to the batch",
        "threads": str(request.threads),
        "order": "interleaved in one process: a repeat times each once, in an order drawn anew, right after a run of "
        "it that is not timed, so that caches hold what it needs",
        "warm-up": f"a first run, then repeats until the medians of two windows of {WINDOW} agree within "
        f"{AGREEMENT:.0%}, or the noise in them, for all",
        "repeats": f"until each ratio is known to {RATIO_KNOWN:.0%} and each median to {MEDIAN_KNOWN:.0%} (half of "
        f"their 95 % intervals), {REPEATS} if they take less than {SHARE_OF_TIME:.0%} of the time; at most "
        f"{request.seconds:g} s a batch, but at least {2 * WINDOW} repeats",
        "ratio": "median of the ratios within repeats, over the first row of the same batch; with transfers, over the "
        "first of those with them",
        "memory": memory,
    }
