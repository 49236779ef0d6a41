"""Latency is compared within repeats, in a rotating order, on a clock that the test turns."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from export.benchmark import paired_latency
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
    stats = paired_latency({"slow": clock.runner("slow", 30), "fast": clock.runner("fast", 12)}, IMAGES, repeats=7)
    assert (stats["slow"].median_ms, stats["slow"].ratio) == (30, 1)
    assert (stats["fast"].p10_ms, stats["fast"].p90_ms, stats["fast"].ratio) == (12, 12, 0.4)
    assert (stats["fast"].repeats, stats["fast"].batch_size) == (7, 4)


def test_drift_that_hits_all_alike_leaves_the_ratio(clock):
    runners = {name: clock.runner(name, time_ms, slowing=0.5) for name, time_ms in (("a", 10), ("b", 5))}
    stats = paired_latency(runners, IMAGES, repeats=9, warmup=0)
    assert stats["b"].ratio == pytest.approx(0.5)
    assert stats["a"].p90_ms > 1.5 * stats["a"].p10_ms


def test_each_repeat_times_every_runner_once_in_an_order_drawn_anew(clock):
    paired_latency({name: clock.runner(name, 1) for name in "abc"}, IMAGES, repeats=30, warmup=1)
    rounds = ["".join(clock.calls[start : start + 3]) for start in range(0, len(clock.calls), 3)]
    assert len(rounds) == 31
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) == 6


@pytest.mark.parametrize("arguments", [{"repeats": 0}, {"warmup": -1}, {"images": IMAGES[:0]}, {"runners": {}}])
def test_what_cannot_be_timed_is_refused(arguments):
    with pytest.raises(InputError, match=r"got|Nothing to time"):
        paired_latency(**({"runners": {"a": np.copy}, "images": IMAGES} | arguments))
