"""Random rank configs: for training the supernet, and straight into the window of a budget.

Low-rank-aware sampling (FLORA, arXiv 2311.03912) draws each block on its own, a candidate in proportion to one over the
product of its rank ratios: low ranks inherit less from the pretrained weights and get more steps. The weight is a
product over layers, so an unfiltered space is drawn layer by layer and nothing is enumerated.
"""

import itertools
import math
import random
from typing import Literal

import numpy as np

from flora.errors import InputError, near_matches
from flora.ranks.budget import Limit, check_reachable
from flora.ranks.cost import ModelCost, Rank
from flora.ranks.space import SearchSpace

Weighting = Literal["low-rank-aware", "uniform"]
WEIGHTINGS: tuple[Weighting, ...] = ("low-rank-aware", "uniform")
MOST_LEVELS = 1 << 16
MOST_DRAWS = 100
LARGEST = 1e300


class Sampler:
    """Draws each decision of a space on its own, by weight."""

    def __init__(self, space: SearchSpace, cost: ModelCost, weighting: Weighting = "low-rank-aware") -> None:
        self._space = space
        self._cost = cost
        self._decisions = space.decisions()
        self._shares = _shares(space, cost, weighting)
        self._cumulative = [list(itertools.accumulate(shares)) for shares in self._shares]

    def sample(self, rng: random.Random) -> dict[str, Rank]:
        """One config."""
        drawn: dict[str, Rank] = {}
        for (layers, candidates), cumulative in zip(self._decisions, self._cumulative, strict=True):
            drawn.update(zip(layers, rng.choices(candidates, cum_weights=cumulative)[0], strict=True))
        return {name: drawn[name] for name in self._space.choices}

    def expected_macs(self) -> float:
        """The mean MACs over all draws, in closed form."""
        shapes = self._cost.shapes
        return self._cost.fixed_macs + math.fsum(
            share * sum(shapes[name].macs(rank) for name, rank in zip(layers, candidate, strict=True))
            for (layers, candidates), shares in zip(self._decisions, self._shares, strict=True)
            for candidate, share in zip(candidates, shares, strict=True)
        )


class BudgetSampler:
    """Draws configs whose cost lies in the window from (1 - `window`) times the limit to the limit, without trial.

    A dynamic program over the decisions holds, for each cost that the decisions from one on can add up to, the summed
    weight of the ways to do so; a draw picks a total in the window and walks through the decisions. The draw has the
    distribution of `weighting` given the window. More than `MOST_LEVELS` different costs are rounded up into bins: then
    a draw is repeated until its exact cost lies in the window, `MOST_DRAWS` times at most, and where none does the
    dearest is taken; configs closer to the limit than one bin for each decision come too rarely.

    Any limit will do whose costs add up over layers; the cheapest config need not have the lowest ranks. The limit is
    lowered to the largest subnet where it lies above. Where no config lies in the window it opens
    downwards to the nearest cost that can be reached. `lowest` and `limit` are its ends; no draw costs more than
    `limit`. `InputError` where every config does.
    """

    def __init__(
        self,
        space: SearchSpace,
        cost: ModelCost,
        budget: Limit,
        *,
        window: float = 0.05,
        weighting: Weighting = "uniform",
    ) -> None:
        if not 0 <= window < 1:
            raise InputError(f"A budget window is a share of the budget, at least 0 and below 1; got {window}.")
        check_reachable(budget, space, cost)
        self._space, self._cost, self._budget = space, cost, budget
        self._decisions = space.decisions()
        self._shares = [np.array(shares) for shares in _shares(space, cost, weighting)]
        self.limit = min(budget.limit, budget.cost_of(cost, space.largest()))
        self.lowest = math.ceil((1 - window) * self.limit)

        smallest = budget.cost_of(cost, budget.cheapest(space, cost))
        self._levels, unit, slack = _levels(space, cost, budget)
        self._tables = _tables(self._levels, self._shares)
        reachable = np.flatnonzero(self._tables[0][: (self.limit - smallest) // unit + 1])
        window_levels = reachable[reachable >= -(-(self.lowest - smallest) // unit)]
        if not len(window_levels):
            window_levels = reachable[-1:]
            self.lowest = smallest + max(0, int(reachable[-1]) - slack) * unit
        self._totals = window_levels
        self._cumulative = np.cumsum(self._tables[0][window_levels])

    def sample(self, rng: random.Random) -> dict[str, Rank]:
        """One config at or below the limit, in the window wherever that can be met."""
        drawn = []
        for _ in range(MOST_DRAWS):
            drawn.append(self._draw(rng))
            if self._budget.cost_of(self._cost, drawn[-1]) >= self.lowest:
                return drawn[-1]
        return max(drawn, key=lambda ranks: self._budget.cost_of(self._cost, ranks))

    def _draw(self, rng: random.Random) -> dict[str, Rank]:
        remaining = int(self._totals[_pick(self._cumulative, rng)])
        drawn: dict[str, Rank] = {}
        for (layers, candidates), levels, shares, table in zip(
            self._decisions, self._levels, self._shares, self._tables[1:], strict=True
        ):
            rest = remaining - levels
            possible = (rest >= 0) & (rest < len(table))
            weights = np.where(possible, shares * table[np.where(possible, rest, 0)], 0.0)
            index = _pick(np.cumsum(weights), rng)
            remaining = int(rest[index])
            drawn.update(zip(layers, candidates[index], strict=True))
        return {name: drawn[name] for name in self._space.choices}


def sandwich(
    space: SearchSpace, sampler: Sampler | BudgetSampler, rng: random.Random, middle: int
) -> list[dict[str, Rank]]:
    """The configs of one training step under the sandwich rule: largest, smallest, and `middle` samples."""
    return [space.largest(), space.smallest(), *(sampler.sample(rng) for _ in range(middle))]


def _shares(space: SearchSpace, cost: ModelCost, weighting: Weighting) -> list[list[float]]:
    """The probability of each candidate of each decision."""
    if weighting not in WEIGHTINGS:
        raise InputError(
            f"{weighting!r} is no weighting; use {' or '.join(WEIGHTINGS)}.{near_matches(weighting, WEIGHTINGS)}"
        )

    def weight(layers: tuple[str, ...], candidate: tuple[Rank, ...]) -> float:
        if weighting == "uniform":
            return 1.0
        return math.prod(
            1.0 if rank == "dense" else cost.shapes[name].full_rank / rank
            for name, rank in zip(layers, candidate, strict=True)
        )

    weights = [[weight(layers, candidate) for candidate in candidates] for layers, candidates in space.decisions()]
    return [[value / math.fsum(values) for value in values] for values in weights]


def _levels(space: SearchSpace, cost: ModelCost, budget: Limit) -> tuple[list[np.ndarray], int, int]:
    """What each candidate costs above the cheapest of its decision, in units; the unit; how many units are rounding."""
    extras = []
    for layers, candidates in space.decisions():
        shapes = [cost.shapes[name] for name in layers]
        costs = [sum(map(budget.layer_cost, shapes, candidate)) for candidate in candidates]
        extras.append(np.array(costs, dtype=np.int64) - min(costs))
    unit = int(np.gcd.reduce(np.concatenate(extras))) or 1
    highest = sum(int(extra.max()) for extra in extras) // unit
    if highest < MOST_LEVELS:
        return [extra // unit for extra in extras], unit, 0
    unit *= -(-highest // (MOST_LEVELS - len(extras)))
    return [-(-extra // unit) for extra in extras], unit, len(extras)


def _tables(levels: list[np.ndarray], shares: list[np.ndarray]) -> list[np.ndarray]:
    """For each decision, and after the last: the weight of all ways in which those from it on add up to each level.

    Each table is scaled to the largest weight a float holds well, so that the rare ends of a long sum do not vanish.
    """
    tables = [np.array([LARGEST])]
    for decision, weights in zip(reversed(levels), reversed(shares), strict=True):
        rest = tables[-1]
        table = np.zeros(len(rest) + int(decision.max()))
        for level, weight in zip(decision.tolist(), weights.tolist(), strict=True):
            table[level : level + len(rest)] += weight * rest
        tables.append(table * (LARGEST / table.max()))
    return tables[::-1]


def _pick(cumulative: np.ndarray, rng: random.Random) -> int:
    """An index in proportion to the weights that `cumulative` sums up; one of weight zero is never picked."""
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
