"""Ranks within a budget, taking the model's error for the sum of the errors of its parts (layers or blocks)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flora.ranks.cost import Rank

MOST_LEVELS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One candidate of one part: its ranks by layer, what it costs, and the error that it adds."""

    ranks: dict[str, Rank]
    cost: int
    error: float


def allocate(parts: Sequence[Sequence[Choice]], limit: int) -> dict[str, Rank] | None:
    """Ranks of least summed error that cost at most `limit`, by dynamic programming; None where nothing fits.

    Exact where what may be spent beyond the cheapest ranks is at most `MOST_LEVELS` times the greatest common divisor
    of the costs. Beyond that costs are rounded up to so many levels: the limit holds, and at most one level for each
    part and one more are left unused.
    """
    fronts = [_front(part) for part in parts]
    spare = limit - sum(front[0].cost for front in fronts)
    if spare < 0:
        return None
    extras = [np.array([choice.cost - front[0].cost for choice in front], dtype=np.int64) for front in fronts]
    useful = min(spare, sum(int(extra[-1]) for extra in extras))
    unit = int(np.gcd.reduce(np.concatenate(extras))) or 1
    if useful // unit > MOST_LEVELS:
        unit = -(-useful // MOST_LEVELS)
    costs = [-(-extra // unit) for extra in extras]
    levels = min(spare // unit, sum(int(cost[-1]) for cost in costs))
    least = np.zeros(levels + 1)  # of the parts so far, for at most so many levels
    taken = []
    for front, cost in zip(fronts, costs, strict=True):
        before, least = least, np.full(levels + 1, np.inf)
        places = np.zeros(levels + 1, dtype=np.int32)
        for place, (choice, level) in enumerate(zip(front, cost.tolist(), strict=True)):
            if level > levels:
                break
            errors = before[: levels + 1 - level] + choice.error
            better = errors < least[level:]
            least[level:][better] = errors[better]
            places[level:][better] = place
        taken.append(places)
    ranks: dict[str, Rank] = {}
    for front, cost, places in zip(fronts[::-1], costs[::-1], taken[::-1], strict=True):
        place = places[levels]
        levels -= int(cost[place])
        ranks = front[place].ranks | ranks
    return ranks


def _front(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that no cheaper one equals or beats, by ascending cost."""
    front: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.cost, choice.error)):
        if not front or choice.error < front[-1].error:
            front.append(choice)
    return front
