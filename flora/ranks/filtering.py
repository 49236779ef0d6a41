"""Low-rank aware candidate filtering: which candidates of a block stay, given how well each one does.

The cost of a block's candidates is cut into bins of equal width, and the best share of each bin stays: so cheap
budgets remain within reach, which they do not when the best of all candidates are kept (the released spaces cannot
express a DeiT-B below 7.1 GMACs). The all-smallest and the all-largest candidate always stay.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from flora.errors import InputError
from flora.ranks.cost import ModelCost, Rank
from flora.ranks.space import SearchSpace

BINS = 9


def block_macs(space: SearchSpace, cost: ModelCost, index: int) -> list[int]:
    """MACs of the block's layers under each of its candidates."""
    shapes = [cost.shapes[name] for name in space.blocks[index]]
    return [
        sum(shape.macs(rank) for shape, rank in zip(shapes, candidate, strict=True))
        for candidate in space.block_candidates(index)
    ]


def cost_bins(macs: Sequence[int], bins: int = BINS) -> list[list[int]]:
    """The places of `macs` in at most `bins` bins of equal width, the cheapest first; empty ones left out."""
    low, high = min(macs), max(macs)
    width = (high - low) / bins or 1
    groups: list[list[int]] = [[] for _ in range(bins)]
    for place, value in enumerate(macs):
        groups[min(int((value - low) / width), bins - 1)].append(place)
    return [group for group in groups if group]


def kept_count(share: float, candidates: int) -> int:
    """How many of a bin's candidates stay."""
    if not 0 < share <= 1:
        raise InputError(f"The share of candidates to keep lies above 0 and at most at 1, got {share}.")
    # In decimals as given: 0.07 * 100 is above 7 in binary.
    return math.ceil(Fraction(str(share)) * candidates)


def kept_candidates(
    candidates: Sequence[tuple[Rank, ...]],
    macs: Sequence[int],
    errors: Sequence[float],
    share: float,
    *,
    bins: int = BINS,
) -> list[tuple[Rank, ...]]:
    """The candidates that stay, in their order: of each bin the `share` with the smallest error.

    `candidates` must be in the order of `SearchSpace.block_candidates`, smallest first and largest last.
    """
    if bad := [error for error in errors if not math.isfinite(error)]:
        raise InputError(f"A candidate's error is {bad[0]}: the supernet gives no finite outputs. Build it again.")
    kept = {0, len(candidates) - 1}
    for group in cost_bins(macs, bins):
        group.sort(key=lambda place: (errors[place], macs[place]))
        kept |= set(group[: kept_count(share, len(group))])
    return [candidates[place] for place in sorted(kept)]


def reachable_macs(space: SearchSpace, cost: ModelCost) -> tuple[int, int, float]:
    """The smallest and largest MACs of the space, and the mean over uniformly drawn configs."""
    decisions = [
        [sum(cost.shapes[name].macs(r) for name, r in zip(names, ranks, strict=True)) for ranks in options]
        for names, options in space.decisions()
    ]
    fixed = cost.fixed_macs
    return (
        fixed + sum(min(macs) for macs in decisions),
        fixed + sum(max(macs) for macs in decisions),
        fixed + float(sum(np.mean(macs) for macs in decisions)),
    )
