"""The search space: the rank choices of each layer, and the blocks that are searched and mutated as one."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, model_validator

from flora.errors import InputError, few, near_matches
from flora.ranks.cost import LayerShape, ModelCost, Rank

GRIDS = {
    "eighths": tuple(n / 8 for n in (1, 2, 3, 4, 5, 6, 8)),
    "sixths": tuple(n / 6 for n in range(1, 7)),
    "sixteenths": tuple(n / 16 for n in (1, 2, 3, 4, 6, 8, 10, 12, 14, 16)),
}
DEFAULT_SPACE = "eighths"
PRESETS = {"deit-b": "eighths", "deit-s": "sixths", "swin": "sixths"}
MOST_CANDIDATES = 20_000


class SearchSpace(BaseModel):
    """Rank choices per layer in ascending order, "dense" last, and a partition of the layers into blocks.

    A block is decided as one. Unfiltered (`candidates` is None), every combination of its layers' choices is a
    candidate; filtering leaves a list for each block, each candidate giving ranks in the order of the block's layers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    choices: dict[str, tuple[Rank, ...]]
    blocks: tuple[tuple[str, ...], ...]
    candidates: tuple[tuple[tuple[Rank, ...], ...], ...] | None = None

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
        if self.candidates is not None:
            self._check_candidates(self.candidates)
        return self

    def _check_candidates(self, candidates: tuple[tuple[tuple[Rank, ...], ...], ...]) -> None:
        if len(candidates) != len(self.blocks):
            raise ValueError(f"candidates must be given for each of the {len(self.blocks)} blocks")
        for block, allowed in zip(self.blocks, candidates, strict=True):
            for end in (0, -1):
                if tuple(self.choices[name][end] for name in block) not in allowed:
                    raise ValueError(f"the candidates of {block[0]} must keep the smallest and the largest choice")
            for candidate in allowed:
                if len(candidate) != len(block) or any(
                    rank not in self.choices[name] for name, rank in zip(block, candidate, strict=True)
                ):
                    raise ValueError(f"{candidate} is no candidate of the block of {block[0]}")
            if len(set(allowed)) != len(allowed):
                raise ValueError(f"the candidates of {block[0]} must be unique")

    @property
    def size(self) -> int:
        """How many configs the space holds."""
        return math.prod(self.block_size(i) for i in range(len(self.blocks)))

    def block_size(self, index: int) -> int:
        """How many candidates a block has."""
        if self.candidates is not None:
            return len(self.candidates[index])
        return math.prod(len(self.choices[name]) for name in self.blocks[index])

    def block_candidates(self, index: int) -> tuple[tuple[Rank, ...], ...]:
        """All candidates of a block, smallest choices first; `InputError` where they are too many to list."""
        if self.candidates is not None:
            return self.candidates[index]
        if self.block_size(index) > MOST_CANDIDATES:
            raise InputError(
                f"The block of {self.blocks[index][0]} has {self.block_size(index):,} candidates, at most "
                f"{MOST_CANDIDATES:,} can be listed; build again with a coarser --space: {', '.join(GRIDS)}, "
                "or larger multiples."
            )
        return tuple(itertools.product(*(self.choices[name] for name in self.blocks[index])))

    def decisions(self) -> tuple[tuple[tuple[str, ...], tuple[tuple[Rank, ...], ...]], ...]:
        """The independent choices that make a config: layers, and the ranks they can get together.

        One decision a layer in an unfiltered space, one a block in a filtered one.
        """
        if self.candidates is None:
            return tuple(((name,), tuple((rank,) for rank in choices)) for name, choices in self.choices.items())
        return tuple(zip(self.blocks, self.candidates, strict=True))

    def smallest(self) -> dict[str, Rank]:
        return {name: choices[0] for name, choices in self.choices.items()}

    def largest(self) -> dict[str, Rank]:
        return {name: choices[-1] for name, choices in self.choices.items()}

    def __contains__(self, ranks: Mapping[str, Rank]) -> bool:
        if ranks.keys() != self.choices.keys() or any(ranks[name] not in self.choices[name] for name in ranks):
            return False
        return self.candidates is None or all(
            tuple(ranks[name] for name in block) in candidates
            for block, candidates in zip(self.blocks, self.candidates, strict=True)
        )


def space_from_text(text: str, cost: ModelCost, *, keep_redundant: bool = False) -> SearchSpace:
    """The space that `text` names: a grid or a paper's preset, `multiples=8`, or `ratios=0.125,0.25,1`.

    `keep_redundant` keeps ranks that cost as much as the dense layer.
    """
    kind, _, values = text.partition("=")
    grid = PRESETS.get(kind, kind)
    try:
        if grid in GRIDS and not values:
            return space_from_ratios(cost, GRIDS[grid], keep_redundant=keep_redundant)
        if kind == "multiples":
            return space_from_multiples(cost, int(values), keep_redundant=keep_redundant)
        if kind == "ratios":
            return space_from_ratios(cost, [float(v) for v in values.split(",")], keep_redundant=keep_redundant)
    except (ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{text!r} is no search space: {values!r} is not made of numbers.") from error
    raise InputError(
        f"{text!r} is no search space; use {', '.join((*GRIDS, *PRESETS))}, multiples=8, or ratios=0.125,0.25,1."
        + near_matches(kind, (*GRIDS, *PRESETS, "multiples", "ratios"))
    )


def space_from_multiples(cost: ModelCost, multiple: int = 8, *, keep_redundant: bool = False) -> SearchSpace:
    """Multiples of `multiple` below break-even, and dense: what an engine at that precision runs well."""
    if multiple < 1:
        raise InputError(f"The rank grid must be a positive multiple, got {multiple}.")
    return _space(cost, lambda layer: range(multiple, layer.full_rank, multiple), keep_redundant)


def space_from_ratios(cost: ModelCost, ratios: Sequence[float], *, keep_redundant: bool = False) -> SearchSpace:
    """The given shares of the full rank, rounded, and dense (the paper's grids)."""
    if bad := [ratio for ratio in ratios if not 0 < ratio <= 1]:
        raise InputError(f"Rank ratios lie above 0 and at most at 1, got {few(map(str, bad))}.")
    return _space(cost, lambda layer: {max(1, round(ratio * layer.full_rank)) for ratio in ratios}, keep_redundant)


def _space(cost: ModelCost, ranks_of: Callable[[LayerShape], Iterable[int]], keep_redundant: bool) -> SearchSpace:
    def choices(layer: LayerShape) -> tuple[Rank, ...]:
        highest = layer.full_rank if keep_redundant else layer.break_even_rank
        return (*sorted(rank for rank in ranks_of(layer) if rank < highest), "dense")

    return SearchSpace(
        choices={layer.name: choices(layer) for layer in cost.layers},
        blocks=blocks_of(layer.name for layer in cost.layers),
    )


def blocks_of(names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Group layer names by the transformer block they lie in."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(block_name(name), []).append(name)
    return tuple(tuple(block) for block in blocks.values())


def block_name(layer: str) -> str:
    """The transformer block that a layer lies in: `blocks.3` for `blocks.3.attn.qkv`."""
    parts = layer.split(".")
    last_index = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
    return ".".join(parts[: last_index + 1])


def _order(rank: Rank) -> float:
    return math.inf if rank == "dense" else rank
