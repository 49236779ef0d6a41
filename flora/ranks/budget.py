"""The budget of a search: the most MACs, parameters or milliseconds that the compact model may take."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flora.errors import InputError, near_matches
from flora.ranks.cost import LayerShape, ModelCost, Rank
from flora.ranks.latency import NANOSECONDS, LatencyModel, LatencyTable
from flora.ranks.space import SearchSpace

CostKind = Literal["macs", "params"]
WORDS = {"macs": "MACs", "params": "parameters"}
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

# What a budget in milliseconds is timed at where its text names no batch size.
USUAL_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Limit(ABC):
    """A limit on what a model costs, in whole numbers that add up over its layers; `text` is how the user wrote it."""

    limit: int
    text: str

    @abstractmethod
    def cost_of(self, cost: ModelCost, ranks: Mapping[str, Rank]) -> int:
        """What counts against the limit for the model materialized at `ranks`."""

    @abstractmethod
    def layer_cost(self, layer: LayerShape, rank: Rank) -> int:
        """The part of `cost_of` that one layer's rank decides."""

    @abstractmethod
    def describe(self, amount: int) -> str:
        """An amount of what is counted, with its unit."""

    @property
    @abstractmethod
    def counts(self) -> str:
        """What is counted, so that two limits that count the same way have the same text here."""

    def cheapest(self, space: SearchSpace, cost: ModelCost) -> dict[str, Rank]:
        """The subnet of `space` that costs least, which need not be the one of the lowest ranks."""
        found: dict[str, Rank] = {}
        for names, candidates in space.decisions():
            shapes = [cost.shapes[name] for name in names]
            costs = [sum(map(self.layer_cost, shapes, candidate)) for candidate in candidates]
            found.update(zip(names, candidates[costs.index(min(costs))], strict=True))
        return {name: found[name] for name in space.choices}

    def left_for_layers(self, cost: ModelCost) -> int:
        """The limit less what no rank changes: what `layer_cost` of all layers may add up to."""
        dense = sum(self.layer_cost(layer, "dense") for layer in cost.layers)
        return self.limit - (self.cost_of(cost, cost.dense_ranks) - dense)


@dataclass(frozen=True, kw_only=True)
class Budget(Limit):
    """At most `limit` MACs or parameters."""

    kind: CostKind

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
        hints = {
            "latency": " For a latency a search needs --latency-table FILE.",
            "drop": " Points are for flora compress without training.",
        }
        raise InputError(
            f"{text!r} is no budget here; write macs=50% (of the dense model), macs=2.7G or params=12M, or a budget of "
            f"time such as latency=0.6x.{hints.get(kind) or near_matches(kind, (*WORDS, *hints))}"
        )

    def cost_of(self, cost: ModelCost, ranks: Mapping[str, Rank]) -> int:
        return cost.macs(ranks) if self.kind == "macs" else cost.params(ranks)

    def layer_cost(self, layer: LayerShape, rank: Rank) -> int:
        return layer.macs(rank) if self.kind == "macs" else layer.weights(rank)

    def describe(self, amount: int) -> str:
        return f"{amount:,} {WORDS[self.kind]}"

    @property
    def counts(self) -> str:
        return self.kind


@dataclass(frozen=True, kw_only=True)
class LatencyBudget(Limit):
    """At most `limit` nanoseconds for one batch, as `latency` predicts them."""

    latency: LatencyModel

    @classmethod
    def parse(cls, text: str, table: LatencyTable) -> "LatencyBudget":
        """The budget meant by `latency=0.6x` (of the dense model) or `latency=12ms`, at a batch size with `@b1`."""
        amount, unit, batch = latency_parts(text)
        latency = LatencyModel(table, batch=batch)
        limit_ms = amount * latency.dense_ms if unit == "x" else amount
        return cls(limit=round(NANOSECONDS * limit_ms), text=text, latency=latency)

    def cost_of(self, cost: ModelCost, ranks: Mapping[str, Rank]) -> int:
        return self.latency.ns(ranks)

    def layer_cost(self, layer: LayerShape, rank: Rank) -> int:
        return self.latency.layer_ns(layer.name, rank)

    def describe(self, amount: int) -> str:
        return f"{amount / NANOSECONDS:.3g} ms at batch {self.latency.batch}"

    @property
    def counts(self) -> str:
        return f"latency at batch {self.latency.batch} by the table {self.latency.digest}"


def asks_for_latency(text: str) -> bool:
    """Whether a budget is one of milliseconds, or of a share of the dense model's."""
    return text.startswith("latency=")


def asks_for_drop(text: str) -> bool:
    """Whether a budget is one of accuracy: then the fastest model within it is looked for."""
    return text.startswith("drop=")


def goes_by_table(text: str) -> bool:
    """Whether a budget needs a latency table."""
    return asks_for_latency(text) or asks_for_drop(text)


def latency_parts(text: str) -> tuple[float, str, int]:
    """Amount, unit (`x` or `ms`) and batch size of `latency=0.6x@b8`; `InputError` for anything else."""
    found = re.fullmatch(r"latency=(\d*\.?\d+)(x|ms)(?:@b(\d+))?", text)
    amount, batch = (float(found[1]), int(found[3] or USUAL_BATCH)) if found else (0.0, 0)
    if not found or amount <= 0 or batch < 1 or (found[2] == "x" and amount > 1):
        raise InputError(
            f"{text!r} is no latency; write latency=0.6x (of the dense model, at most 1x) or latency=12ms, for a batch "
            f"size other than {USUAL_BATCH} with @b1."
        )
    return amount, found[2], batch


def drop_parts(text: str) -> tuple[float, int]:
    """Points and batch size of `drop=0.5@b8`; `InputError` for anything else."""
    found = re.fullmatch(r"drop=(\d*\.?\d+)(?:@b(\d+))?", text)
    points, batch = (float(found[1]), int(found[2] or USUAL_BATCH)) if found else (0.0, 0)
    if not found or points > 100 or batch < 1:
        raise InputError(
            f"{text!r} is no drop; write drop=0.5 for at most half a point, for a batch size other than {USUAL_BATCH} "
            "with @b1."
        )
    return points, batch


def check_reachable(budget: Limit, space: SearchSpace, cost: ModelCost) -> None:
    """Raise `InputError` when no subnet of `space` lies within `budget`; one above the largest subnet is no error."""
    dense, smallest, largest = (
        budget.cost_of(cost, ranks) for ranks in (cost.dense_ranks, budget.cheapest(space, cost), space.largest())
    )
    if budget.limit < smallest:
        raise InputError(
            f"The budget {budget.text} ({budget.describe(budget.limit)}, {budget.limit / dense:.2%} of dense) is below "
            f"the smallest subnet; the space reaches from {budget.describe(smallest)} ({smallest / dense:.2%}) to "
            f"{budget.describe(largest)} ({largest / dense:.2%}). Raise the budget, or give the space smaller ranks."
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
