"""The choice of images is balanced, repeatable and complete."""

import numpy as np
import pytest

from calibrate.batches import balanced_choice


@pytest.mark.parametrize("count", [1, 7, 20, 33])
def test_classes_get_equal_shares(count):
    labels = np.random.default_rng(1).integers(0, 10, 500)
    chosen = balanced_choice(labels, count)
    assert len(set(chosen)) == count
    shares = np.bincount(labels[chosen], minlength=10)
    assert shares.max() - shares.min() <= 1


def test_a_rare_class_gives_what_it_has():
    labels = [0] * 100 + [1] * 3
    chosen = balanced_choice(labels, 20)
    assert len(chosen) == 20
    assert {100, 101, 102} <= set(chosen)


def test_the_seed_decides():
    labels = np.arange(1000) % 7
    assert balanced_choice(labels, 50) == balanced_choice(labels, 50)
    assert balanced_choice(labels, 50) != balanced_choice(labels, 50, seed=1)


def test_without_labels_they_come_from_everywhere():
    chosen = balanced_choice([-1] * 1000, 100)
    assert len(set(chosen)) == 100
    assert 350 < np.mean(chosen) < 650


def test_more_than_there_are_is_all():
    assert balanced_choice([0, 1, 1], 10) == [0, 1, 2]
