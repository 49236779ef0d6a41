"""Exact cost of a rank config: multiply-accumulates (MACs) and parameters of the materialized model.

One traced pass of the dense model (`flora.lowrank.targets`) gives the tokens of each target and the MACs of everything
else, attention products included; from then on cost is integer arithmetic. Two factors cost `tokens * r * (in + out)`
MACs, one matrix `tokens * in * out`: at or above the break-even rank the materialized model holds the dense product,
and so does the cost. A layer in pivoted form (`flora.lowrank.pivot`) costs `tokens * r * (in + out - r)` at any rank.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeGuard

from pydantic import StrictInt

from flora.errors import InputError

Rank = StrictInt | Literal["dense"]


def break_even_rank(in_features: int, out_features: int) -> int:
    """The smallest rank at which two factors cost at least as much as the dense matrix."""
    return -(-in_features * out_features // (in_features + out_features))


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One factorizable linear layer: `tokens` are the rows it multiplies for one image."""

    name: str
    in_features: int
    out_features: int
    tokens: int

    def __post_init__(self) -> None:
        if min(self.in_features, self.out_features, self.tokens) < 1:
            raise InputError(f"{self.name}: in_features, out_features and tokens must be positive, got {self}.")

    @cached_property
    def full_rank(self) -> int:
        return min(self.in_features, self.out_features)

    @cached_property
    def dense_weights(self) -> int:
        return self.in_features * self.out_features

    @cached_property
    def break_even_rank(self) -> int:
        return break_even_rank(self.in_features, self.out_features)

    def is_factored(self, rank: Rank, *, pivoted: bool = False) -> TypeGuard[int]:
        """Whether materializing at `rank` gives factors instead of the dense product; pivoted ones are at any rank."""
        return rank != "dense" and (pivoted or rank < self.break_even_rank)

    def weights(self, rank: Rank, *, pivoted: bool = False) -> int:
        """Weights that the materialized layer multiplies each token with, biases left out."""
        if not self.is_factored(rank, pivoted=pivoted):
            return self.dense_weights
        return rank * (self.in_features + self.out_features - (rank if pivoted else 0))

    def macs(self, rank: Rank, *, pivoted: bool = False) -> int:
        """MACs of the materialized layer for one image."""
        return self.tokens * self.weights(rank, pivoted=pivoted)


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """The cost of a whole model as a function of its ranks.

    `fixed_macs` and `fixed_params` count everything that ranks do not change: the layers that are no targets,
    attention products, and the targets' biases.
    """

    layers: tuple[LayerShape, ...]
    fixed_macs: int
    fixed_params: int

    @cached_property
    def shapes(self) -> dict[str, LayerShape]:
        return {layer.name: layer for layer in self.layers}

    def macs(self, ranks: Mapping[str, Rank], pivoted: Collection[str] = ()) -> int:
        """MACs for one image of the model materialized at `ranks` (a rank for each layer), some layers `pivoted`."""
        return self.fixed_macs + sum(
            layer.macs(ranks[layer.name], pivoted=layer.name in pivoted) for layer in self.layers
        )

    def params(self, ranks: Mapping[str, Rank], pivoted: Collection[str] = ()) -> int:
        """Parameters of the model materialized at `ranks`, some layers `pivoted`."""
        return self.fixed_params + sum(
            layer.weights(ranks[layer.name], pivoted=layer.name in pivoted) for layer in self.layers
        )

    @cached_property
    def dense_ranks(self) -> dict[str, Rank]:
        return {layer.name: "dense" for layer in self.layers}

    @cached_property
    def dense_macs(self) -> int:
        return self.macs(self.dense_ranks)

    @cached_property
    def dense_params(self) -> int:
        return self.params(self.dense_ranks)

    @cached_property
    def smallest_macs(self) -> int:
        """MACs with every layer at rank one: no budget below it can be met."""
        return self.macs({layer.name: 1 for layer in self.layers})
