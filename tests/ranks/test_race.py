"""A race keeps what may be best, spends few images on what is not, and does not depend on the order of its field."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from flora.errors import InputError
from flora.ranks.race import Raced, race

IMAGES = 2048
ALL_RUNGS = [128, 512, IMAGES]


class Field:
    """Candidates with given scores; each is known by its rank, and the images asked for are kept."""

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores.astype(np.float32)
        self.candidates = [{"layer": i + 1} for i in range(len(scores))]
        self.asked: list[tuple[int, int]] = []

    def evaluate(self, configs, start: int, stop: int) -> list[np.ndarray]:
        self.asked.append((start, stop))
        return [self.scores[config["layer"] - 1, start:stop] for config in configs]

    def race(self, *, images: int = IMAGES, order: Sequence[int] | None = None, **options) -> list[Raced]:
        candidates = self.candidates if order is None else [self.candidates[i] for i in order]
        return race(candidates, self.evaluate, images=images, **options)


def _noisy(means: Sequence[float], seed: int, *, images: int = IMAGES) -> Field:
    """Right or wrong on each image; hard images are hard for all, as they are for subnets of one supernet."""
    rng = np.random.default_rng(seed)
    hardness, own = rng.uniform(-0.5, 0.5, images), rng.uniform(-0.5, 0.5, (len(means), images))
    return Field((np.array(means)[:, None] - 0.5 + 0.7 * hardness + 0.3 * own) > 0)


def test_what_stays_has_its_scores_on_all_images_and_what_goes_those_it_was_given():
    field = _noisy(np.linspace(0.3, 0.8, 30), 0)
    raced = field.race(keep=3)
    assert {one.images for one in raced} == set(ALL_RUNGS)
    for i, one in enumerate(raced):
        assert one.ranks == field.candidates[i]
        assert one.scores.dtype == np.float32
        assert np.array_equal(one.scores, field.scores[i, : one.images])
        assert one.score == field.scores[i, : one.images].mean(dtype=np.float64)


@pytest.mark.parametrize(
    ("images", "asked"),
    [
        (2048, [(0, 128), (128, 512), (512, 2048)]),
        (512, [(0, 64), (64, 128), (128, 512)]),
        (200, [(0, 64), (64, 200)]),
        (64, [(0, 64)]),
        (1, [(0, 1)]),
    ],
)
def test_images_are_taken_in_sixteenths_quarters_and_all_but_at_least_64(images: int, asked: list):
    field = Field(np.ones((2, images)))
    field.race(images=images, keep=1)
    assert field.asked == asked


@pytest.mark.parametrize("seed", range(5))
def test_the_best_on_all_images_is_found(seed: int):
    field = _noisy(np.linspace(0.4, 0.6, 40), seed)
    raced = field.race(keep=5)
    best = max(range(40), key=lambda i: field.scores[i].mean())
    assert max(raced, key=lambda one: (one.images, one.score)).ranks == field.candidates[best]


@pytest.mark.parametrize("seed", range(5))
def test_at_least_the_number_to_keep_stays(seed: int):
    field = _noisy(np.full(20, 0.5), seed)
    assert sum(one.images == IMAGES for one in field.race(keep=6, z=0)) >= 6


def test_without_a_true_difference_few_are_dropped():
    dropped = [one.images < IMAGES for seed in range(20) for one in _noisy(np.full(50, 0.6), seed).race(keep=10)]
    assert sum(dropped) / len(dropped) < 0.02


def test_a_clear_difference_saves_nearly_all_images():
    raced = _noisy([0.8] * 3 + [0.4] * 47, 1).race(keep=3)
    assert [one.images for one in raced] == [IMAGES] * 3 + [128] * 47


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_candidates_does_not_matter(seed: int):
    field = _noisy(np.random.default_rng(seed).uniform(0.4, 0.6, 30).round(2), seed)
    order = list(range(30))
    random.Random(seed).shuffle(order)
    plain, shuffled = field.race(keep=4), field.race(keep=4, order=order)
    assert [one.images for one in shuffled] == [plain[i].images for i in order]


def test_equal_scores_are_never_dropped():
    field = Field(np.tile(np.random.default_rng(0).random(IMAGES), (10, 1)))
    assert all(one.images == IMAGES for one in field.race(keep=1, z=0))


def test_a_difference_without_variance_is_taken_as_it_is():
    field = Field(np.tile(np.array([[0.5], [0.5], [0.25]]), IMAGES))
    assert [one.images for one in field.race(keep=1)] == [IMAGES, IMAGES, 128]


def test_incumbents_raise_the_bar_and_may_drop_the_whole_field():
    field = _noisy([0.5] * 8, 2)
    incumbents = list(_noisy([0.9] * 3, 3).scores)
    assert all(one.images == IMAGES for one in field.race(keep=8))
    assert all(one.images == 128 for one in field.race(keep=3, incumbents=incumbents))
    assert field.asked[-1] == (0, 128)


def test_nobody_is_dropped_while_there_are_fewer_than_to_keep():
    assert all(one.images == IMAGES for one in _noisy([0.1, 0.9], 0).race(keep=3))


def test_no_candidates_give_no_result():
    assert Field(np.ones((0, IMAGES))).race(keep=1) == []


@pytest.mark.parametrize("rungs", [[], [64], [0, IMAGES], [64, 64, IMAGES], [128, 64, IMAGES], [64, 2 * IMAGES]])
def test_rungs_ascend_to_all_images(rungs: list[int]):
    with pytest.raises(InputError, match=f"all {IMAGES} images"):
        Field(np.ones((2, IMAGES))).race(keep=1, rungs=rungs)


def test_an_evaluation_of_another_shape_or_not_finite_is_refused():
    with pytest.raises(InputError, match="gave 2 arrays"):
        Field(np.ones((2, 100))).race(keep=1)
    with pytest.raises(InputError, match="not finite"):
        Field(np.full((2, IMAGES), np.nan)).race(keep=1)


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 1, "incumbents": [np.ones(3)]}, {"keep": 1, "images": 0}])
def test_a_race_that_cannot_be_is_refused(options: dict):
    with pytest.raises(InputError, match="at least one"):
        Field(np.ones((2, IMAGES))).race(**options)
