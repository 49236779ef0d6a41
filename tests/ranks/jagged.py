"""A latency budget on a device where a higher rank may be faster, as kernels are by steps."""

import random

from flora.ranks.budget import LatencyBudget
from flora.ranks.cost import ModelCost
from flora.ranks.latency import LatencyTable, ModelLatency, Site, SiteLatency


def jagged_table(cost: ModelCost, seed: int = 0) -> LatencyTable:
    """Each layer at every rank with a time of its own, in which ranks count, and chance counts as much."""
    draw = random.Random(seed)
    sites = []
    for layer in cost.layers:
        ranks = tuple(range(1, layer.break_even_rank + 1))
        full_ms = layer.dense_weights * layer.tokens / 1e5
        sites.append(
            SiteLatency(
                site=Site(in_features=layer.in_features, out_features=layer.out_features, tokens=layer.tokens),
                layers=(layer.name,),
                batch=8,
                precision="fp32",
                dense_ms=full_ms,
                ranks=ranks,
                ms=tuple(full_ms * (0.1 + 0.6 * rank / ranks[-1] + 0.6 * draw.random()) for rank in ranks),
                spread=0.01,
            )
        )
    low = {one.layers[0]: one.ranks[0] for one in sites}
    sums = {"dense": sum(one.dense_ms for one in sites), "low": sum(one.at(one.ranks[0]) for one in sites)}
    models = tuple(
        ModelLatency(
            name=name, ranks=low if name == "low" else {}, batch=8, precision="fp32", ms=sums["dense"] / 10 + total
        )
        for name, total in sums.items()
    )
    facts = {"model": "toy", "device": {}, "runtime": {}, "clocks": {}, "created": "now"}
    return LatencyTable(**facts, sites=tuple(sites), models=models)


def jagged_budget(cost: ModelCost, share: float, seed: int = 0) -> LatencyBudget:
    """That share of the dense model's latency."""
    return LatencyBudget.parse(f"latency={share}x", jagged_table(cost, seed))
