"""Allocated ranks equal the best of all combinations wherever that lies on the convex hull, and never cost too much."""

import itertools
import random

import pytest

from flora.ranks.allocate import Choice, allocate
from flora.ranks.cost import Rank

Blocks = list[list[Choice]]
SCALES = [(1, 1.0), (10**9, 1e-7), (1, 1e6)]


def random_blocks(seed: int, *, cost_scale: int = 1, error_scale: float = 1.0) -> Blocks:
    """Four blocks of five candidates with two layers each; cost and error are drawn without regard to each other."""
    rng = random.Random(seed)
    return [
        [
            Choice(
                ranks={f"blocks.{block}.fc1": place + 1, f"blocks.{block}.fc2": 5 - place},
                cost=rng.randint(1, 30) * cost_scale,
                error=rng.random() * error_scale,
            )
            for place in range(5)
        ]
        for block in range(4)
    ]


def combinations(blocks: Blocks) -> list[tuple[int, float]]:
    """Cost and error of every combination, the cheapest first."""
    return sorted((sum(c.cost for c in one), sum(c.error for c in one)) for one in itertools.product(*blocks))


def cost_and_error(blocks: Blocks, ranks: dict[str, Rank]) -> tuple[int, float]:
    chosen = [next(c for c in block if c.ranks.items() <= ranks.items()) for block in blocks]
    assert ranks == {name: rank for choice in chosen for name, rank in choice.ranks.items()}
    return sum(c.cost for c in chosen), sum(c.error for c in chosen)


def convex_hull(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The corners that less error for more cost leads along, with ever smaller returns; `points` ascend."""
    hull: list[tuple[int, float]] = []
    for cost, error in points:
        if hull and error >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (a, error_a), (b, error_b) = hull[-2:]
            if (error_a - error_b) * (cost - b) > (error_b - error) * (b - a):
                break
            hull.pop()
        hull.append((cost, error))
    return hull


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("cost_scale", "error_scale"), SCALES)
def test_the_dearest_corner_of_the_convex_hull_within_the_limit_is_taken(seed, cost_scale, error_scale):
    blocks = random_blocks(seed, cost_scale=cost_scale, error_scale=error_scale)
    hull = convex_hull(combinations(blocks))
    assert len(hull) >= 5
    for limit in range(hull[0][0], hull[-1][0] + 2 * cost_scale, cost_scale):
        cost, error = max(corner for corner in hull if corner[0] <= limit)
        assert cost_and_error(blocks, allocate(blocks, limit)) == (cost, pytest.approx(error, rel=1e-9))


@pytest.mark.parametrize("seed", range(5))
def test_no_combination_of_at_most_the_same_cost_has_less_error(seed: int):
    blocks = random_blocks(seed)
    every = combinations(blocks)
    for limit in range(every[0][0], every[-1][0] + 1, 3):
        cost, error = cost_and_error(blocks, allocate(blocks, limit))
        assert cost <= limit
        assert error == pytest.approx(min(other for paid, other in every if paid <= cost))


@pytest.mark.parametrize("seed", range(5))
def test_a_higher_limit_never_adds_error_nor_takes_cost_away(seed: int):
    blocks = random_blocks(seed)
    found = [cost_and_error(blocks, allocate(blocks, limit)) for limit in range(combinations(blocks)[0][0], 121)]
    assert [cost for cost, _ in found] == sorted(cost for cost, _ in found)
    assert [error for _, error in found] == sorted((error for _, error in found), reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_only_below_the_cheapest_combination_nothing_fits(seed: int):
    blocks = random_blocks(seed)
    cheapest = combinations(blocks)[0]
    assert allocate(blocks, cheapest[0] - 1) is None
    assert cost_and_error(blocks, allocate(blocks, cheapest[0])) == (cheapest[0], pytest.approx(cheapest[1]))


def test_with_ample_limit_each_block_has_its_least_error_at_its_least_cost():
    tie = [Choice(ranks={"a": rank}, cost=cost, error=0.5) for rank, cost in ((3, 30), (1, 10), (2, 20))]
    worse = Choice(ranks={"a": 4}, cost=1, error=0.6)
    assert allocate([[worse, *tie]], 1000) == {"a": 1}


def test_blocks_that_are_alike_are_raised_together_or_not_at_all():
    low, high = Choice(ranks={}, cost=1, error=1.0), Choice(ranks={}, cost=3, error=0.0)
    blocks = [
        [Choice(ranks={name: rank}, cost=c.cost, error=c.error) for rank, c in ((1, low), (2, high))] for name in "ab"
    ]
    assert allocate(blocks, 5) == {"a": 1, "b": 1}
    assert allocate(blocks, 6) == {"a": 2, "b": 2}
