"""Times are taken from steady calls, often enough, on a clock that the test turns."""

import itertools
import math
import time

import numpy as np
import pytest

from export import latency
from export.latency import WINDOW, median_interval, repeated_ms, settled_ms, spread_of, steady_from
from flora.errors import FloraError


class Clock:
    """A clock that each call moves on by what its turn of `durations_ms` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns, self.calls = 0, 0
        monkeypatch.setattr(time, "perf_counter_ns", lambda: self.now_ns)

    def call(self, *durations_ms: float, before: tuple[float, ...] = ()):
        """Takes what `before` says, then `durations_ms` over and over."""
        turns = itertools.chain(before, itertools.cycle(durations_ms))

        def run() -> None:
            self.calls += 1
            self.now_ns += round(1e6 * next(turns))

        return run


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def noise(repeats: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, 0.1, repeats)


def test_a_warm_up_is_left_out_of_the_times(clock):
    cooling = tuple(100 * 0.8**turn for turn in range(12))
    times = repeated_ms([clock.call(5.0, before=cooling), clock.call(3.0)], enough=lambda ms: ms.shape[1] >= 30)
    assert times.steady
    assert 5 <= times.discarded <= 12
    assert np.median(times.ms, axis=1).tolist() == [5.0, 3.0]
    assert times.ms.shape[1] >= 30


def test_steady_calls_waste_nothing_but_their_first_run(clock):
    times = repeated_ms([clock.call(7.0, before=(900.0,))], enough=lambda ms: True)
    assert (times.discarded, times.ms.tolist()) == (0, [[7.0] * 2 * WINDOW])
    assert clock.calls == 1 + 2 * WINDOW


@pytest.mark.parametrize("slope", [0.02, -0.02, 0.1])
def test_a_steady_drift_of_more_than_the_noise_is_never_steady(slope):
    drifting = 10 * np.exp(slope * np.arange(60)) * (1 + 0.001 * np.sin(np.arange(60)))
    assert steady_from(drifting[None]) is None


def test_noise_alone_is_steady_from_almost_the_beginning():
    found = [steady_from(10 * noise(40, seed)[None]) for seed in range(100)]
    assert None not in found
    assert sum(first <= 2 for first in found if first is not None) >= 90


def test_what_is_not_steady_for_one_call_is_for_none():
    steady, late = np.full(40, 5.0), np.concatenate([np.geomspace(50, 5, 20), np.full(20, 5.0)])
    assert steady_from(steady[None]) == 0
    assert steady_from(np.stack([steady, late])) == steady_from(late[None])
    assert steady_from(late[None]) > 10
    assert steady_from(steady[None, : 2 * WINDOW - 1]) is None


def test_drift_ends_with_the_limit_and_is_told(clock):
    growing = clock.call(1.0, before=tuple(1.05**turn for turn in range(200)))
    times = repeated_ms([growing], enough=lambda ms: True, most_repeats=40)
    assert not times.steady
    assert times.discarded == times.ms.shape[1] >= 20


def test_time_is_limited_in_seconds(clock):
    times = repeated_ms([clock.call(100.0)], enough=lambda ms: False, seconds=3)
    assert 30 <= times.ms.shape[1] <= 33


def test_each_repeat_times_every_call_once_in_an_order_drawn_anew(clock):
    order: list[str] = []

    def call(name: str):
        tick = clock.call(1.0)
        return lambda: (order.append(name), tick())

    repeated_ms([call(name) for name in "abc"], enough=lambda ms: ms.shape[1] >= 30)
    rounds = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) == 6


def test_a_lead_runs_right_before_each_timed_run_and_is_not_timed(clock):
    order: list[str] = []

    def call(name: str):
        turn = clock.call(50.0, 4.0, before=(900.0,))
        return lambda: (order.append(name), turn())

    times = repeated_ms([call("a"), call("b")], enough=lambda ms: True, leads=1)
    assert times.ms.tolist() == [[4.0] * 2 * WINDOW] * 2
    pairs = list(zip(order[2::2], order[3::2], strict=True))
    assert all(lead == timed for lead, timed in pairs)


@pytest.mark.parametrize("count", [6, 9, 10, 31, 100, 2000])
def test_the_interval_of_a_median_holds_it_in_95_of_100_cases_and_is_no_wider(count):
    low, high = median_interval(np.arange(1.0, count + 1))
    assert low + high == count + 1
    if count <= 1000:
        outside = [sum(math.comb(count, i) for i in range(k)) / 2**count for k in (int(low), int(low) + 1)]
        assert outside[0] <= 0.025 < outside[1]
    assert abs(low - (count / 2 - 0.98 * math.sqrt(count))) < 1.1


def test_the_interval_covers_the_true_median_of_a_skewed_distribution():
    covered = 0
    for seed in range(400):
        low, high = median_interval(np.random.default_rng(seed).exponential(size=25))
        covered += low <= math.log(2) <= high
    assert covered >= 0.93 * 400


def test_fewer_than_six_values_have_no_interval():
    assert median_interval(np.ones(5)) is None
    assert spread_of(np.ones(5)) is None
    assert spread_of(np.full(6, 3.0)) == 0


def test_steady_calls_settle_at_once(clock):
    settled = settled_ms([clock.call(400.0), clock.call(100.0)], what="steady calls")
    assert settled.medians_ms == (400.0, 100.0)
    assert settled.spreads == (0.0, 0.0)
    repeats, _ = latency.REPEATS
    assert clock.calls == 2 * (3 + repeats)


def test_few_disturbances_do_not_move_the_median(clock):
    settled = settled_ms([clock.call(*[10.0] * 9, 50.0), clock.call(5.0)], what="calls")
    assert settled.medians_ms == (10.0, 5.0)


def test_a_device_that_is_too_busy_is_refused_after_more_repeats(clock):
    noisy = clock.call(100.0, 500.0, 120.0, 480.0, 300.0)
    with pytest.raises(FloraError, match=r"too busy to measure a noisy layer: after \d+ repeats .* uncertain by \d+%"):
        settled_ms([noisy], what="a noisy layer")
    assert clock.calls > 2 * latency.ATTEMPTS
