"""The simplest choice of ranks: the same share of the full rank for every layer."""

from flora.errors import InputError
from flora.ranks.cost import ModelCost, Rank


def uniform_ranks(cost: ModelCost, ratio: float) -> dict[str, Rank]:
    """`round(ratio * full rank)` for each layer, at least one; "dense" where that is the full rank."""
    if not 0 < ratio <= 1:
        raise InputError(f"A rank ratio lies above 0 and at most at 1, got {ratio}.")
    ranks = {layer.name: max(1, round(ratio * layer.full_rank)) for layer in cost.layers}
    return {name: "dense" if rank == cost.shapes[name].full_rank else rank for name, rank in ranks.items()}


def uniform_ranks_for_macs(cost: ModelCost, macs: int) -> dict[str, Rank]:
    """The largest uniform ratio whose model costs at most `macs`; `InputError` where none does."""
    if macs < cost.smallest_macs:
        raise InputError(
            f"A budget of {macs / 1e6:.1f} MMACs is below the smallest model, {cost.smallest_macs / 1e6:.1f} MMACs "
            f"({cost.smallest_macs / cost.dense_macs:.1%} of dense); raise the budget or factorize more layers."
        )
    if macs >= cost.dense_macs:
        return cost.dense_ranks
    # The cost is a monotone staircase in the ratio: 50 halvings leave an interval with no step inside.
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost.macs(uniform_ranks(cost, middle)) <= macs else (low, middle)
    return uniform_ranks(cost, low or high)
