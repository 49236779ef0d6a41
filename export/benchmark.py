"""Latency of several runners, measured in pairs: what is compared is the median of the ratios within repeats.

Not the ratio of two medians, which are of different moments.
"""

from collections.abc import Mapping
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from export.latency import median_interval, repeated_ms, spread_of
from export.runners import Runner
from flora.errors import InputError


class LatencyStats(BaseModel):
    """Latency of one batch, in milliseconds, and the images that it computes in a second.

    A percentile that no repeat lies beyond is None: 10 repeats have a p90, 100 a p99. `spread` is half the 95 %
    interval of the median, relative to it. `ratio` is the median of this runner's time over the first runner's in the
    same repeat, and `ratio_interval` its 95 % interval. Fewer than 6 repeats have no interval. What is not
    `steady` still drifted when it was timed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    median_ms: float
    p90_ms: float | None
    p99_ms: float | None
    spread: float | None
    images_per_s: float
    ratio: float
    ratio_interval: tuple[float, float] | None
    repeats: int
    batch_size: int
    steady: bool = True

    @classmethod
    def of(cls, times_ms: np.ndarray, first_ms: np.ndarray, *, batch_size: int, steady: bool = True) -> Self:
        """From the milliseconds of this runner and of the first one in the same repeats."""
        ratios = times_ms / first_ms
        median_ms = float(np.median(times_ms))
        return cls(
            median_ms=median_ms,
            p90_ms=_percentile(times_ms, 90),
            p99_ms=_percentile(times_ms, 99),
            spread=spread_of(times_ms),
            images_per_s=batch_size * 1000 / median_ms,
            ratio=float(np.median(ratios)),
            ratio_interval=median_interval(ratios),
            repeats=len(times_ms),
            batch_size=batch_size,
            steady=steady,
        )

    @property
    def ratio_spread(self) -> float | None:
        """Half the interval of the ratio, relative to it."""
        if self.ratio_interval is None:
            return None
        low, high = self.ratio_interval
        return (high - low) / 2 / self.ratio


def paired_latency(runners: Mapping[str, Runner], images: np.ndarray, *, repeats: int) -> dict[str, LatencyStats]:
    """Time each runner on `images` [B, C, H, W], which on a GPU lie there already; the first is compared with.

    Each at least `repeats` times once all are steady, for which as many again are waited; right before each timed run
    is one that is not.
    """
    if not runners or len(images) == 0:
        raise InputError(f"Nothing to time: {len(runners)} runners and {len(images)} images; give one of each.")
    if repeats < 1:
        raise InputError(f"At least 1 repeat is needed, got {repeats}.")
    calls = [runner.bind(images) for runner in runners.values()]
    times = repeated_ms(calls, enough=lambda ms: ms.shape[1] >= repeats, most_repeats=2 * repeats, leads=1)
    return {
        name: LatencyStats.of(times.ms[index], times.ms[0], batch_size=len(images), steady=times.steady)
        for index, name in enumerate(runners)
    }


def _percentile(times_ms: np.ndarray, percent: int) -> float | None:
    return float(np.percentile(times_ms, percent)) if len(times_ms) * (100 - percent) >= 100 else None
