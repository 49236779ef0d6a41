"""The search space: the rank choices of each layer, and the blocks that are searched and mutated as one."""

import math
from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, model_validator

from flora.errors import InputError, few
from flora.ranks.cost import LayerShape, ModelCost, Rank


class SearchSpace(BaseModel):
    """Rank choices per layer in ascending order, "dense" last, and a partition of the layers into blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    choices: dict[str, tuple[Rank, ...]]
    blocks: tuple[tuple[str, ...], ...]

    @model_validator(mode="after")
    def _check(self) -> "SearchSpace":
        grouped = [name for block in self.blocks for name in block]
        if sorted(grouped) != sorted(self.choices):
            raise ValueError("blocks must hold every layer of choices exactly once")
        for name, choices in self.choices.items():
            if not choices or list(choices) != sorted(set(choices), key=_order):
                raise ValueError(f'{name}: choices must be unique and ascending with "dense" last, got {choices}')
            if choices[0] != "dense" and choices[0] < 1:
                raise ValueError(f"{name}: a rank is at least 1, got {choices[0]}")
        return self

    @property
    def size(self) -> int:
        """How many configs the space holds."""
        return math.prod(len(choices) for choices in self.choices.values())

    def smallest(self) -> dict[str, Rank]:
        return {name: choices[0] for name, choices in self.choices.items()}

    def largest(self) -> dict[str, Rank]:
        return {name: choices[-1] for name, choices in self.choices.items()}

    def __contains__(self, ranks: Mapping[str, Rank]) -> bool:
        return ranks.keys() == self.choices.keys() and all(ranks[name] in self.choices[name] for name in ranks)


def space_from_multiples(cost: ModelCost, multiple: int = 8) -> SearchSpace:
    """Multiples of `multiple` below break-even, and dense: what an engine at that precision runs well."""
    if multiple < 1:
        raise InputError(f"The rank grid must be a positive multiple, got {multiple}.")
    return _space(cost, lambda layer: range(multiple, layer.break_even_rank, multiple))


def space_from_ratios(cost: ModelCost, ratios: Sequence[float]) -> SearchSpace:
    """The given shares of the full rank, rounded, and dense for the share 1 (the paper's grids)."""
    if bad := [ratio for ratio in ratios if not 0 < ratio <= 1]:
        raise InputError(f"Rank ratios lie above 0 and at most at 1, got {few(map(str, bad))}.")
    return _space(cost, lambda layer: {max(1, round(ratio * layer.full_rank)) for ratio in ratios})


def _space(cost: ModelCost, ranks_of) -> SearchSpace:
    def choices(layer: LayerShape) -> tuple[Rank, ...]:
        return (*sorted(rank for rank in ranks_of(layer) if layer.is_factored(rank)), "dense")

    return SearchSpace(
        choices={layer.name: choices(layer) for layer in cost.layers},
        blocks=blocks_of(layer.name for layer in cost.layers),
    )


def blocks_of(names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Group layer names by the transformer block they lie in: `blocks.3.attn.qkv` belongs to `blocks.3`."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        last_index = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
        blocks.setdefault(".".join(parts[: last_index + 1]), []).append(name)
    return tuple(tuple(block) for block in blocks.values())


def _order(rank: Rank) -> float:
    return math.inf if rank == "dense" else rank
