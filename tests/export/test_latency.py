"""Medians are repeated until they have settled, on a clock that the test turns."""

import itertools
import time

import pytest

from export import latency
from export.latency import settled_ms
from flora.errors import FloraError


class Clock:
    """A clock that each call moves on by what its turn of `durations_ms` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns, self.calls = 0, 0
        monkeypatch.setattr(time, "perf_counter_ns", lambda: self.now_ns)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now_ns / 1e9)

    def call(self, *durations_ms: float):
        turns = itertools.cycle(durations_ms)

        def run() -> None:
            self.calls += 1
            self.now_ns += round(1e6 * next(turns))

        return run


def test_steady_calls_settle_at_once(monkeypatch):
    clock = Clock(monkeypatch)
    settled = settled_ms([clock.call(400.0), clock.call(100.0)], what="steady calls")
    assert settled.medians_ms == (400.0, 100.0)
    assert settled.spreads == (0.0, 0.0)
    repeats, _ = latency.REPEATS
    assert clock.calls == 2 * (2 + latency.WARMUP + repeats)


def test_few_disturbances_do_not_move_the_median(monkeypatch):
    clock = Clock(monkeypatch)
    settled = settled_ms([clock.call(*[10.0] * 9, 50.0), clock.call(5.0)], what="calls")
    assert settled.medians_ms == (10.0, 5.0)


def test_a_device_that_is_too_busy_is_refused_after_more_repeats(monkeypatch):
    clock = Clock(monkeypatch)
    noisy = clock.call(100.0, 500.0, 120.0, 480.0, 300.0)
    with pytest.raises(FloraError, match=r"too busy to measure a noisy layer: after \d+ repeats .* uncertain by \d+%"):
        settled_ms([noisy], what="a noisy layer")
    assert clock.calls > 2 * latency.ATTEMPTS
