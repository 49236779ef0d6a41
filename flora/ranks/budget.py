"""The budget of a search: the most MACs or parameters that the compact model may have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flora.errors import InputError, near_matches
from flora.ranks.cost import LayerShape, ModelCost, Rank
from flora.ranks.space import SearchSpace

CostKind = Literal["macs", "params"]
WORDS = {"macs": "MACs", "params": "parameters"}
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """At most `limit` MACs or parameters; `text` is how the user wrote it."""

    kind: CostKind
    limit: int
    text: str

    def __post_init__(self) -> None:
        if self.kind not in WORDS or self.limit < 1:
            raise InputError(f"A budget has a kind ({', '.join(WORDS)}) and a positive limit, got {self}.")

    @classmethod
    def parse(cls, text: str, cost: ModelCost) -> "Budget":
        """The budget meant by `macs=50%` (of the whole dense model), `macs=2.7G` or `params=12M`."""
        kind, _, amount = text.partition("=")
        if kind == "macs":
            return cls(kind="macs", limit=_limit(amount, cost.dense_macs, given=text, word=WORDS[kind]), text=text)
        if kind == "params":
            return cls(kind="params", limit=_limit(amount, cost.dense_params, given=text, word=WORDS[kind]), text=text)
        raise InputError(
            f"{text!r} is no budget; write macs=50% (of the dense model), macs=2.7G or params=12M."
            + near_matches(kind, WORDS)
        )

    def cost_of(self, cost: ModelCost, ranks: Mapping[str, Rank]) -> int:
        """What counts against the limit for the model materialized at `ranks`."""
        return cost.macs(ranks) if self.kind == "macs" else cost.params(ranks)

    def left_for_layers(self, cost: ModelCost) -> int:
        """The limit less what no rank changes: what `layer_cost` of all layers may add up to."""
        dense = sum(self.layer_cost(layer, "dense") for layer in cost.layers)
        return self.limit - (self.cost_of(cost, cost.dense_ranks) - dense)

    def layer_cost(self, layer: LayerShape, rank: Rank) -> int:
        """The part of `cost_of` that one layer's rank decides."""
        return layer.macs(rank) if self.kind == "macs" else layer.weights(rank)


def check_reachable(budget: Budget, space: SearchSpace, cost: ModelCost) -> None:
    """Raise `InputError` when no subnet of `space` lies within `budget`; one above the largest subnet is no error."""
    dense, smallest, largest = (
        budget.cost_of(cost, ranks) for ranks in (cost.dense_ranks, space.smallest(), space.largest())
    )
    if budget.limit < smallest:
        raise InputError(
            f"The budget {budget.text} ({budget.limit:,} {WORDS[budget.kind]}, {budget.limit / dense:.2%} of dense) is "
            f"below the smallest subnet; the space reaches from {smallest:,} ({smallest / dense:.2%}) to {largest:,} "
            f"({largest / dense:.2%}). Raise the budget, or give the space smaller ranks."
        )


def macs_budget(text: str, cost: ModelCost) -> int:
    """MACs meant by `50%` (of the whole dense model, attention products included), `2.7G`, `800M` or a plain number."""
    return _limit(text, cost.dense_macs, given=text, word=WORDS["macs"])


def _limit(amount: str, dense: int, *, given: str, word: str) -> int:
    """The number that `amount` writes; `given` is what the message of the `InputError` quotes."""
    percent = amount.endswith("%")
    scale = UNITS.get(amount[-1:].upper(), 1)
    number = amount[:-1] if percent or scale != 1 else amount
    try:
        limit = int(float(number) * dense / 100 if percent else float(number) * scale)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"{given!r} is no {word} budget; write a percentage (50%) or a number (2.7G, 800M)."
        ) from error
    if limit <= 0 or (percent and limit > dense):
        raise InputError(f"{given!r} is no {word} budget: it must lie above 0 and at most at 100%.")
    return limit
