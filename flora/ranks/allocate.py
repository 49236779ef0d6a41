"""Ranks within a budget, taking the model's error for the sum of its blocks' errors."""

from collections.abc import Sequence
from dataclasses import dataclass

from flora.ranks.cost import Rank


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One candidate of one block: its ranks by layer, what it costs, and the error that it adds."""

    ranks: dict[str, Rank]
    cost: int
    error: float


def allocate(blocks: Sequence[Sequence[Choice]], limit: int) -> dict[str, Rank] | None:
    """Ranks of least summed error that cost at most `limit`, by Lagrange multiplier; None where nothing fits.

    Every block takes the candidate with the least error + price * cost; the price is bisected until the sum fits. That
    is exact up to the convex hull of each block's candidates.
    """

    def chosen(price: float) -> list[Choice]:
        return [min(block, key=lambda c: (c.error + price * c.cost, c.cost)) for block in blocks]

    def cost(choices: Sequence[Choice]) -> int:
        return sum(choice.cost for choice in choices)

    cheapest = [min(block, key=lambda c: (c.cost, c.error)) for block in blocks]
    if cost(cheapest) > limit:
        return None
    best, low, high = cheapest, 0.0, 1.0
    while cost(chosen(high)) > limit and high < 1e30:
        high *= 16
    for _ in range(100):
        middle = (low + high) / 2
        choices = chosen(middle)
        if cost(choices) <= limit:
            best, high = choices, middle
        else:
            low = middle
    return {name: rank for choice in best for name, rank in choice.ranks.items()}
