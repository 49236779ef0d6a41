"""Medians that can be trusted: repeats until they have settled, and a refusal where the device is too busy."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from export.benchmark import interleaved_ms
from flora.errors import FloraError

WARMUP = 2
REPEATS = (9, 60)
ATTEMPTS = 4
MOST_SPREAD = 0.1
# Seconds that an attempt takes where the calls are fast enough for the fewest repeats.
SECONDS = 4.0


@dataclass(frozen=True, kw_only=True)
class Settled:
    """Median of each call in milliseconds, and its spread: half the 95 % interval of the median, relative to it."""

    medians_ms: tuple[float, ...]
    spreads: tuple[float, ...]


def settled_ms(calls: Sequence[Callable[[], object]], *, what: str) -> Settled:
    """Time `calls` interleaved until every median's spread is at most `MOST_SPREAD`.

    `FloraError` naming `what` where more repeats do not help.
    """
    for call in calls:
        call()
    started = time.perf_counter()
    for call in calls:
        call()
    once = max(1e-9, time.perf_counter() - started)
    repeats = int(np.clip(SECONDS / once, *REPEATS))
    times_ms = np.empty((len(calls), 0))
    for attempt in range(ATTEMPTS):
        more = interleaved_ms(calls, repeats=repeats, warmup=0 if attempt else WARMUP, seed=attempt)
        times_ms = np.concatenate([times_ms, more], axis=1)
        settled = _settled(times_ms)
        if max(settled.spreads) <= MOST_SPREAD:
            return settled
    raise FloraError(
        f"The device is too busy to measure {what}: after {times_ms.shape[1]} repeats a median is still uncertain by "
        f"{max(settled.spreads):.0%}, allowed are {MOST_SPREAD:.0%}. Stop what else runs here, or pin the process to "
        "a free processor; then the same command goes on where it was stopped. Fewer --threads are disturbed less."
    )


def _settled(times_ms: np.ndarray) -> Settled:
    """Medians with distribution-free intervals, from order statistics of `times_ms` [calls, repeats]."""
    ordered = np.sort(times_ms, axis=1)
    count = ordered.shape[1]
    margin = 0.98 * math.sqrt(count)
    low, high = max(0, math.floor(count / 2 - margin)), min(count - 1, math.ceil(count / 2 + margin))
    medians = np.median(ordered, axis=1)
    spreads = (ordered[:, high] - ordered[:, low]) / 2 / medians
    return Settled(medians_ms=tuple(medians.tolist()), spreads=tuple(spreads.tolist()))
