"""Allocated ranks have the least error of all combinations within the limit, and never cost more."""

import itertools
import random

import pytest

from flora.ranks import allocate as module
from flora.ranks.allocate import Choice, allocate
from flora.ranks.cost import Rank

Parts = list[list[Choice]]
SCALES = [(1, 1.0), (10**9, 1e-7), (7, 1e6)]


def random_parts(seed: int, *, cost_scale: int = 1, error_scale: float = 1.0) -> Parts:
    """Four parts of five candidates with two layers each; cost and error are drawn without regard to each other."""
    rng = random.Random(seed)
    return [
        [
            Choice(
                ranks={f"blocks.{part}.fc1": place + 1, f"blocks.{part}.fc2": 5 - place},
                cost=rng.randint(1, 30) * cost_scale,
                error=rng.random() * error_scale,
            )
            for place in range(5)
        ]
        for part in range(4)
    ]


def combinations(parts: Parts) -> list[tuple[int, float]]:
    """Cost and error of every combination, the cheapest first."""
    return sorted((sum(c.cost for c in one), sum(c.error for c in one)) for one in itertools.product(*parts))


def cost_and_error(parts: Parts, ranks: dict[str, Rank] | None) -> tuple[int, float]:
    assert ranks is not None
    chosen = [next(c for c in part if c.ranks.items() <= ranks.items()) for part in parts]
    assert ranks == {name: rank for choice in chosen for name, rank in choice.ranks.items()}
    return sum(c.cost for c in chosen), sum(c.error for c in chosen)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("cost_scale", "error_scale"), SCALES)
def test_no_combination_within_the_limit_has_less_error(seed: int, cost_scale: int, error_scale: float):
    parts = random_parts(seed, cost_scale=cost_scale, error_scale=error_scale)
    every = combinations(parts)
    for limit in range(every[0][0], every[-1][0] + 3 * cost_scale, cost_scale):
        cost, error = cost_and_error(parts, allocate(parts, limit))
        assert cost <= limit
        assert error == pytest.approx(min(other for paid, other in every if paid <= limit), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_with_few_levels_the_limit_holds_and_hardly_more_than_a_level_for_each_part_is_left(
    seed: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "MOST_LEVELS", 20)
    parts = random_parts(seed, cost_scale=1009)
    every = combinations(parts)
    for limit in range(every[0][0], every[-1][0], 1009):
        cost, error = cost_and_error(parts, allocate(parts, limit))
        assert cost <= limit
        level = -(-(limit - every[0][0]) // 20)
        reached = [other for paid, other in every if paid <= limit - (len(parts) + 1) * level]
        assert error <= min(reached, default=float("inf")) + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_only_below_the_cheapest_combination_nothing_fits(seed: int):
    parts = random_parts(seed)
    cheapest = combinations(parts)[0]
    assert allocate(parts, cheapest[0] - 1) is None
    assert cost_and_error(parts, allocate(parts, cheapest[0])) == (cheapest[0], pytest.approx(cheapest[1]))


def test_with_ample_limit_each_part_has_its_least_error_at_its_least_cost():
    tie = [Choice(ranks={"a": rank}, cost=cost, error=0.5) for rank, cost in ((3, 30), (1, 10), (2, 20))]
    worse = Choice(ranks={"a": 4}, cost=1, error=0.6)
    assert allocate([[worse, *tie]], 10**12) == {"a": 1}


def test_what_is_left_goes_to_one_of_two_parts_that_are_alike():
    parts = [
        [Choice(ranks={name: rank}, cost=cost, error=error) for rank, cost, error in ((1, 1, 1.0), (2, 3, 0.0))]
        for name in "ab"
    ]
    assert sorted((allocate(parts, 5) or {}).values()) == [1, 2]
    assert allocate(parts, 6) == {"a": 2, "b": 2}


def test_layers_keep_their_order():
    parts = [[Choice(ranks={name: 1}, cost=1, error=0.0)] for name in "zbca"]
    assert list(allocate(parts, 4) or {}) == list("zbca")
