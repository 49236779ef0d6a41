"""Times that can be trusted: calls interleaved until they are steady, and repeated until enough is known.

In each repeat every call is timed once, in an order drawn anew, so that drift hits all alike and none always follows
the same other. How long a device warms up is measured, not assumed: repeats are left out until the medians of two
windows that follow each other agree for every call.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np

from flora.errors import FloraError

# Repeats of a window, by how much the medians of two may differ, and how many standard errors of that difference.
WINDOW = 5
AGREEMENT = 0.02
STANDARD_ERRORS = 3
# The standard error of the difference of two windows' medians, over the median deviation from the median in one.
ERROR_OF_DEVIATION = 1.4826 * 1.2533 * math.sqrt(2 / WINDOW)
# Beyond it a median, or a ratio of two, says too little.
MOST_SPREAD = 0.1
WHEN_BUSY = "Stop what else runs here, or pin the process to a free processor; fewer --threads are disturbed less."
# Of a settled median: the least repeats, as many as this takes seconds, and how often as many again.
REPEATS = (2 * WINDOW, 60)
SECONDS = 4.0
ATTEMPTS = 4

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Times:
    """`ms` [calls, repeats] after the `discarded` repeats of the warm-up; not `steady`, these are the second half."""

    ms: np.ndarray
    discarded: int
    steady: bool


@dataclass(frozen=True, kw_only=True)
class Settled:
    """Median of each call in milliseconds, and its spread: half the 95 % interval of the median, relative to it."""

    medians_ms: tuple[float, ...]
    spreads: tuple[float, ...]


def repeated_ms(
    calls: Sequence[Call],
    *,
    enough: Callable[[np.ndarray], bool],
    most_repeats: float = math.inf,
    seconds: float = math.inf,
    leads: int = 0,
    seed: int = 0,
) -> Times:
    """Time `calls` interleaved until they are steady and `enough` of the milliseconds [calls, repeats] since then.

    Ends after `most_repeats` or `seconds` at the latest, and never before two windows. The first run of each call, in
    which runtimes allocate and compile, is not timed. `leads` are runs of a call right before each that is timed: with
    them caches hold what it needs, as when nothing else runs.
    """
    for call in calls:
        call()
    times_ms = np.empty((len(calls), 0))
    draw = np.random.default_rng(seed)
    started = time.perf_counter_ns()
    with _no_garbage_collection():
        while True:
            missing = 2 * WINDOW - times_ms.shape[1]
            block = max(missing, 1, times_ms.shape[1] // 10)
            times_ms = np.concatenate([times_ms, interleaved_ms(calls, repeats=block, draw=draw, leads=leads)], axis=1)
            first = steady_from(times_ms)
            if first is not None and enough(times_ms[:, first:]):
                break
            if times_ms.shape[1] >= most_repeats or time.perf_counter_ns() - started >= seconds * 1e9:
                break
    discarded = times_ms.shape[1] // 2 if first is None else first
    return Times(ms=times_ms[:, discarded:], discarded=discarded, steady=first is not None)


def interleaved_ms(calls: Sequence[Call], *, repeats: int, draw: np.random.Generator, leads: int = 0) -> np.ndarray:
    """Milliseconds of each call in each repeat, [calls, repeats]; a repeat times all calls once, in a drawn order."""
    times_ms = np.empty((len(calls), repeats))
    for repeat in range(repeats):
        for index in draw.permutation(len(calls)):
            for _ in range(leads):
                calls[index]()
            start = time.perf_counter_ns()
            calls[index]()
            times_ms[index, repeat] = max(1, time.perf_counter_ns() - start) / 1e6
    return times_ms


def steady_from(times_ms: np.ndarray) -> int | None:
    """The first repeat from which two windows agree in every row of `times_ms` [calls, repeats]; None before that.

    Their medians differ by at most `AGREEMENT`, or by no more than the noise within the later window lets them.
    """
    if times_ms.shape[1] < 2 * WINDOW:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(times_ms, WINDOW, axis=1)
    medians = np.median(windows, axis=2)
    errors = ERROR_OF_DEVIATION * np.median(np.abs(windows - medians[..., None]), axis=2)
    earlier, later = medians[:, :-WINDOW], medians[:, WINDOW:]
    allowed = np.maximum(AGREEMENT * later, STANDARD_ERRORS * errors[:, WINDOW:])
    agree = (np.abs(earlier - later) <= allowed).all(axis=0)
    return int(agree.argmax()) if agree.any() else None


def median_interval(values: np.ndarray) -> tuple[float, float] | None:
    """A 95 % interval of the median of `values`, whatever their distribution; None for fewer than 6."""
    outside = _outside(len(values))
    if outside == 0:
        return None
    ordered = np.sort(values)
    return float(ordered[outside - 1]), float(ordered[-outside])


@cache
def _outside(count: int) -> int:
    """The largest k for which the median lies between the k-th smallest and k-th largest of `count` in 95 % of cases.

    So many values are below the median as heads in `count` throws of a coin.
    """
    tail, k = 0.0, 0
    while True:
        log_ways = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        tail += math.exp(log_ways - count * math.log(2))
        if tail > 0.025:
            return k
        k += 1


def spread_of(values: np.ndarray) -> float | None:
    """Half the 95 % interval of the median, relative to it; None for fewer than 6 values."""
    interval = median_interval(values)
    return None if interval is None else (interval[1] - interval[0]) / 2 / float(np.median(values))


def settled_ms(calls: Sequence[Call], *, what: str) -> Settled:
    """Time `calls` interleaved until every median's spread is at most `MOST_SPREAD`.

    `FloraError` naming `what` where more repeats do not help.
    """
    for call in calls:
        call()
    started = time.perf_counter_ns()
    for call in calls:
        call()
    once = max(1, time.perf_counter_ns() - started) / 1e9
    repeats = int(np.clip(SECONDS / once, *REPEATS))
    times = repeated_ms(
        calls,
        enough=lambda ms: ms.shape[1] >= repeats and max(map(_spread, ms)) <= MOST_SPREAD,
        most_repeats=ATTEMPTS * repeats,
    )
    spreads = tuple(map(_spread, times.ms))
    if max(spreads) > MOST_SPREAD:
        raise FloraError(
            f"The device is too busy to measure {what}: after {times.ms.shape[1]} repeats a median is still uncertain "
            f"by {max(spreads):.0%}, allowed are {MOST_SPREAD:.0%}. {WHEN_BUSY} Then the same command goes on where it "
            "was stopped."
        )
    return Settled(medians_ms=tuple(np.median(times.ms, axis=1).tolist()), spreads=spreads)


def _spread(values: np.ndarray) -> float:
    spread = spread_of(values)
    assert spread is not None  # two windows are more than 6
    return spread


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
