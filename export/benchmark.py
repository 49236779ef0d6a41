"""Latency of several runners, measured in pairs: interleaved in one process, so that drift hits them all alike.

In each repeat every runner is timed once, in an order drawn anew, so that none always follows the same other. What is
compared is the median of the ratios within repeats, not the ratio of two medians taken at different times.
"""

import time
from collections.abc import Callable, Mapping

import numpy as np
from pydantic import BaseModel, ConfigDict

from flora.errors import InputError


class LatencyStats(BaseModel):
    """Latency of one batch; `ratio` is the median of this runner's time over the first runner's in the same repeat."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    median_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int
    batch_size: int
    ratio: float


def paired_latency(
    runners: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    images: np.ndarray,
    *,
    repeats: int = 30,
    warmup: int = 3,
) -> dict[str, LatencyStats]:
    """Time each runner on `images` [B, C, H, W]; the first one is what the others are compared with."""
    if not runners or len(images) == 0:
        raise InputError(f"Nothing to time: {len(runners)} runners and {len(images)} images; give one of each.")
    if repeats < 1 or warmup < 0:
        raise InputError(f"At least 1 repeat and 0 warm-up rounds are needed, got {repeats} and {warmup}.")
    names = list(runners)
    for _ in range(warmup):
        for name in names:
            runners[name](images)
    times_ms = np.empty((len(names), repeats))
    draw = np.random.default_rng(0)
    for repeat in range(repeats):
        for index in draw.permutation(len(names)):
            times_ms[index, repeat] = _timed_ms(runners[names[index]], images)
    ratios = times_ms / times_ms[0]
    return {
        name: _stats(times_ms[index], ratio=float(np.median(ratios[index])), batch_size=len(images))
        for index, name in enumerate(names)
    }


def _timed_ms(runner: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> float:
    start = time.perf_counter_ns()
    runner(images)
    return max(1, time.perf_counter_ns() - start) / 1e6


def _stats(times_ms: np.ndarray, *, ratio: float, batch_size: int) -> LatencyStats:
    p10, median, p90 = np.quantile(times_ms, (0.1, 0.5, 0.9))
    return LatencyStats(
        median_ms=float(median),
        p10_ms=float(p10),
        p90_ms=float(p90),
        repeats=len(times_ms),
        batch_size=batch_size,
        ratio=ratio,
    )
