"""Latency of several runners, measured in pairs: interleaved in one process, so that drift hits them all alike.

In each repeat every runner is timed once, in an order drawn anew, so that none always follows the same other. What is
compared is the median of the ratios within repeats, not the ratio of two medians taken at different times.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from export.runners import Runner
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
    runners: Mapping[str, Runner],
    images: np.ndarray,
    *,
    repeats: int = 30,
    warmup: int = 3,
) -> dict[str, LatencyStats]:
    """Time each runner on `images` [B, C, H, W], which on a GPU lie there already; the first is compared with."""
    if not runners or len(images) == 0:
        raise InputError(f"Nothing to time: {len(runners)} runners and {len(images)} images; give one of each.")
    if repeats < 1 or warmup < 0:
        raise InputError(f"At least 1 repeat and 0 warm-up rounds are needed, got {repeats} and {warmup}.")
    calls = [runner.bind(images) for runner in runners.values()]
    times_ms = interleaved_ms(calls, repeats=repeats, warmup=warmup)
    ratios = times_ms / times_ms[0]
    return {
        name: _stats(times_ms[index], ratio=float(np.median(ratios[index])), batch_size=len(images))
        for index, name in enumerate(runners)
    }


def interleaved_ms(calls: Sequence[Callable[[], object]], *, repeats: int, warmup: int, seed: int = 0) -> np.ndarray:
    """Milliseconds of each call in each repeat, [calls, repeats]; a repeat makes all calls once, in a drawn order."""
    for _ in range(warmup):
        for call in calls:
            call()
    times_ms = np.empty((len(calls), repeats))
    draw = np.random.default_rng(seed)
    for repeat in range(repeats):
        for index in draw.permutation(len(calls)):
            times_ms[index, repeat] = _timed_ms(calls[index])
    return times_ms


def _timed_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    call()
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
