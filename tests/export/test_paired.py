"""The interval of a drop and McNemar's test equal what is published and what is counted by hand."""

import math

import numpy as np
import pytest

from export.paired import PairedAccuracy


def test_only_images_on_which_the_two_differ_count():
    reference, other = np.array([1, 1, 1, 0, 0, 1], bool), np.array([1, 0, 0, 1, 0, 1], bool)
    assert PairedAccuracy.of(reference, other) == PairedAccuracy(images=6, lost=2, won=1)
    assert PairedAccuracy.of(reference, other).drop == pytest.approx(100 / 6)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (3, 3), (5, 1), (0, 9), (40, 25)])
def test_the_p_value_is_the_share_of_splits_as_uneven(lost, won):
    differing = lost + won
    ways = [math.comb(differing, k) for k in range(differing + 1)]
    as_uneven = sum(count for k, count in enumerate(ways) if abs(2 * k - differing) >= abs(lost - won))
    assert PairedAccuracy(images=100, lost=lost, won=won).p_value == pytest.approx(as_uneven / 2**differing)


def test_the_p_value_of_very_many_images_is_a_number():
    assert PairedAccuracy(images=10**6, lost=50_000, won=49_000).p_value == pytest.approx(0.00149, rel=0.01)


def test_the_interval_holds_the_true_drop_as_often_as_it_says():
    rng = np.random.default_rng(0)
    images, lost, won = 400, 0.03, 0.015
    drawn = [rng.multinomial(images, (lost, won, 1 - lost - won)) for _ in range(4000)]
    intervals = [PairedAccuracy(images=images, lost=a, won=b).interval for a, b, _ in drawn]
    inside = np.mean([low <= 100 * (lost - won) <= high for low, high in intervals])
    assert 0.935 <= inside <= 0.97


def test_models_that_agree_on_all_images_may_still_differ_on_others():
    few, many = (PairedAccuracy(images=count, lost=0, won=0).interval for count in (50, 10_000))
    assert few[0] == -few[1]
    assert few[1] > 5
    assert 0.02 < many[1] < 0.04
