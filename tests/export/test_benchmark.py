"""Latency is compared within repeats, and percentiles are given where there are repeats for them."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from export.benchmark import LatencyStats, paired_latency
from flora.errors import InputError

IMAGES = np.zeros((4, 1, 2, 2), dtype=np.float32)


class Clock:
    """A clock that advances only when a runner says so, slower by the repeat."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.calls: list[str] = []

    def runner(self, name: str, milliseconds: float, slowing: float = 0.0):
        def run(images: np.ndarray) -> np.ndarray:
            drift = 1 + slowing * self.calls.count(name)
            self.calls.append(name)
            self.now_ns += round(milliseconds * drift * 1e6)
            return images

        return SimpleNamespace(bind=lambda images: lambda: run(images))


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter_ns", lambda: clock.now_ns)
    return clock


def test_figures_are_milliseconds_of_one_batch(clock):
    stats = paired_latency({"slow": clock.runner("slow", 30), "fast": clock.runner("fast", 12)}, IMAGES, repeats=17)
    slow, fast = stats["slow"], stats["fast"]
    assert (slow.median_ms, slow.ratio, slow.spread) == (30, 1, 0)
    assert (fast.median_ms, fast.p90_ms, fast.ratio, fast.ratio_interval) == (12, 12, 0.4, (0.4, 0.4))
    assert (fast.repeats, fast.batch_size) == (17, 4)
    assert fast.images_per_s == pytest.approx(4 / 0.012)


def test_drift_that_hits_all_alike_leaves_the_ratio(clock):
    runners = {name: clock.runner(name, time_ms, slowing=0.5) for name, time_ms in (("a", 10), ("b", 5))}
    stats = paired_latency(runners, IMAGES, repeats=15)
    assert stats["b"].ratio == pytest.approx(0.5)
    assert stats["b"].ratio_spread == pytest.approx(0, abs=1e-9)
    assert stats["a"].spread > 0.1


def test_percentiles_are_those_of_numpy_and_the_ratio_is_that_within_repeats():
    rng = np.random.default_rng(0)
    first = rng.lognormal(0, 1, 400)
    times_ms = 0.7 * first * rng.lognormal(0, 0.01, 400)
    stats = LatencyStats.of(times_ms, first, batch_size=2)
    assert (stats.median_ms, stats.p90_ms, stats.p99_ms) == tuple(np.percentile(times_ms, (50, 90, 99)))
    assert stats.ratio == np.median(times_ms / first) == pytest.approx(0.7, rel=0.01)
    low, high = stats.ratio_interval
    assert low < stats.ratio < high
    assert stats.ratio_spread < 0.01 < stats.spread


@pytest.mark.parametrize(
    ("repeats", "p90", "p99"), [(9, False, False), (10, True, False), (99, True, False), (100, True, True)]
)
def test_a_percentile_needs_a_repeat_beyond_it(repeats, p90, p99):
    times_ms = np.arange(1.0, repeats + 1)
    stats = LatencyStats.of(times_ms, times_ms, batch_size=1)
    assert (stats.p90_ms is not None, stats.p99_ms is not None) == (p90, p99)
    assert all(
        (times_ms > percentile).sum() >= 1 for percentile in (stats.p90_ms, stats.p99_ms) if percentile is not None
    )


def test_few_repeats_have_a_median_and_no_interval():
    stats = LatencyStats.of(np.array([2.0, 4.0]), np.array([4.0, 4.0]), batch_size=1)
    assert (stats.median_ms, stats.ratio) == (3, 0.75)
    assert (stats.spread, stats.ratio_interval, stats.ratio_spread) == (None, None, None)
    assert LatencyStats.model_validate_json(stats.model_dump_json()) == stats


@pytest.mark.parametrize("arguments", [{"repeats": 0}, {"images": IMAGES[:0]}, {"runners": {}}])
def test_what_cannot_be_timed_is_refused(arguments):
    with pytest.raises(InputError, match=r"got|Nothing to time"):
        paired_latency(**({"runners": {"a": np.copy}, "images": IMAGES, "repeats": 3} | arguments))
