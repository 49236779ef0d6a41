"""What ranks cost in milliseconds on one device, from a table that was measured there.

A Vision Transformer has few shapes of linear layers, so each shape is measured at several ranks; a model's latency is a
fixed part plus the sum over its layers, times a factor near one: within a whole model caches are not as warm as in a
small graph. Both numbers are fitted to a few whole models that were measured as well.
"""

import hashlib
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from flora.artifact import Document
from flora.errors import InputError, few
from flora.ranks.cost import LayerShape, Rank, break_even_rank

NANOSECONDS = 1e6  # in a millisecond


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Site(_Facts):
    """One shape of linear layer with what follows it: operators of ONNX (`Add` of a bias, `Gelu`, ...), in order.

    `Residual` is the sum with another branch; `tokens` are the rows that it multiplies for one image.
    """

    in_features: int
    out_features: int
    tokens: int
    after: tuple[str, ...] = ()

    def is_of(self, layer: LayerShape) -> bool:
        """Whether `layer` has this shape and as many tokens."""
        return (self.in_features, self.out_features, self.tokens) == (
            layer.in_features,
            layer.out_features,
            layer.tokens,
        )

    @property
    def full_rank(self) -> int:
        return min(self.in_features, self.out_features)

    def __str__(self) -> str:
        return f"{self.in_features} to {self.out_features}, {self.tokens} tokens"


class SiteLatency(_Facts):
    """Medians of one shape at one batch size: `ms` by rank, ascending; `spread` is the largest one of a median.

    `pivoted_ms` are those of the pivoted form (`flora.lowrank.pivot`), at `pivoted_ranks`.
    """

    site: Site
    layers: tuple[str, ...]
    batch: int
    precision: str
    dense_ms: float
    ranks: tuple[int, ...]
    ms: tuple[float, ...]
    pivoted_ranks: tuple[int, ...] = ()
    pivoted_ms: tuple[float, ...] = ()
    spread: float

    def at(self, rank: Rank) -> float:
        """Milliseconds of two factors at `rank`, on the line between the nearest measured ranks.

        Below the lowest one on the line through the first two; above the highest in proportion.
        """
        if rank == "dense":
            return self.dense_ms
        (first, second), (low, high) = self.ranks[:2], self.ms[:2]
        at_zero = max(0.0, low - first * (high - low) / (second - first))
        return float(np.interp(rank, (0, *self.ranks), (at_zero, *self.ms))) * max(1.0, rank / self.ranks[-1])

    def materialized(self, rank: Rank, *, pivoted: bool = False) -> float:
        """Milliseconds of what materializing at `rank` gives: from the break-even in MACs on, the dense layer.

        Those of the pivoted form lie on lines between the measured ones by their weights, which are no line by rank.
        """
        if pivoted and rank != "dense":
            both = self.site.in_features + self.site.out_features
            weights = [r * (both - r) for r in (rank, *self.pivoted_ranks)]
            return float(np.interp(weights[0], weights[1:], self.pivoted_ms))
        factored = rank != "dense" and rank < break_even_rank(self.site.in_features, self.site.out_features)
        return self.at(rank if factored else "dense")

    def pivots(self, rank: Rank) -> bool:
        """Whether the pivoted form is the fastest one at `rank`; never outside the ranks that it was measured at."""
        if rank == "dense" or not self.pivoted_ranks:
            return False
        if not self.pivoted_ranks[0] <= rank <= self.pivoted_ranks[-1]:
            return False
        return self.materialized(rank, pivoted=True) < min(self.materialized(rank), self.dense_ms)

    @property
    def fastest_pivoted(self) -> list[int]:
        """The ranks at which the pivoted form is the fastest one."""
        return [rank for rank in range(1, self.site.full_rank) if self.pivots(rank)]

    @property
    def break_even_rank(self) -> int:
        """The rank from which on two factors are not faster than the dense layer; full rank if they always are."""
        faster = [rank for rank in range(1, self.site.full_rank) if self.at(rank) < self.dense_ms]
        return max(faster, default=0) + 1


class ModelLatency(_Facts):
    """The median of one whole model, by which the table is calibrated."""

    name: str
    ranks: dict[str, Rank]
    pivoted: tuple[str, ...] = ()
    batch: int
    precision: str
    ms: float


class LatencyTable(Document):
    """`latency.json`: what one model's layers cost on one device with one runtime.

    `device` and `runtime` are facts that must be the same where the table is used; `clocks` may differ and are noted.
    `digest` is of all other fields: a table that was edited or damaged is refused.
    """

    kind: Literal["flora latency table"] = "flora latency table"
    model: str
    device: dict[str, str]
    runtime: dict[str, str]
    clocks: dict[str, str]
    sites: tuple[SiteLatency, ...]
    models: tuple[ModelLatency, ...]
    created: str
    digest: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        content = hashlib.sha256(self.model_dump_json(exclude={"digest"}).encode()).hexdigest()
        if not self.digest:
            object.__setattr__(self, "digest", content)
        if self.digest != content:
            raise ValueError("the digest is not that of the content: the table was edited or damaged; measure again")
        return self

    def check(
        self, *, model: str, layers: Mapping[str, LayerShape], device: dict[str, str], runtime: dict[str, str]
    ) -> None:
        """Raise `InputError` naming what differs unless the table is for this model, device and runtime."""
        here = {"model": model, **device, **runtime}
        there = {"model": self.model, **self.device, **self.runtime}
        keys = [key for key in here | there if here.get(key) != there.get(key)]
        differing = [f"{key}: {there.get(key, 'nothing')}, here {here.get(key, 'nothing')}" for key in keys]
        # What a command decides, and no device.
        same = " ".join(f"--{key} {there[key]}" for key in ("runtime", "threads") if key in keys and key in there)
        known = {name: one.site for one in self.sites for name in one.layers}
        if missing := [name for name in layers if name not in known]:
            differing.append(f"layers without a measurement: {few(missing)}")
        if changed := [name for name, shape in layers.items() if name in known and not known[name].is_of(shape)]:
            differing.append(f"layers of another shape or number of tokens: {few(changed)}")
        if differing:
            raise InputError(
                f"The latency table was measured elsewhere ({'; '.join(differing)}). "
                f"{f'Give {same}, as it was measured, or measure' if same else 'Measure'} one here: "
                "flora latency-table MODEL -o FILE."
            )

    @property
    def conditions(self) -> list[tuple[int, str]]:
        """The batch sizes and precisions that were measured."""
        return list(dict.fromkeys((one.batch, one.precision) for one in self.sites))


class LatencyModel:
    """The latency of a model as a function of its ranks, at one batch size and precision of a table."""

    def __init__(self, table: LatencyTable, *, batch: int, precision: str = "fp32") -> None:
        if (batch, precision) not in table.conditions:
            measured = [f"batch {size} in {kind}" for size, kind in table.conditions]
            raise InputError(
                f"The latency table holds no batch {batch} in {precision}, only {few(measured)}. Give one of these, "
                "or measure another table."
            )
        self.batch, self.precision, self.digest = batch, precision, table.digest
        self._sites = {
            layer: one
            for one in table.sites
            if (one.batch, one.precision) == (batch, precision)
            for layer in one.layers
        }
        self._layer_ns: dict[tuple[str, Rank], int] = {}
        self.measured = [one for one in table.models if (one.batch, one.precision) == (batch, precision)]
        self.fixed_ms, self.scale = self._fit(self.measured)

    def _fit(self, models: list[ModelLatency]) -> tuple[float, float]:
        """The line through sum and measurement, by least squares of the relative errors."""
        sums = np.array([self._sum(one.ranks, one.pivoted) for one in models])
        measured = np.array([one.ms for one in models])
        rows = np.stack([1 / measured, sums / measured], axis=1)
        (fixed, scale), *_ = np.linalg.lstsq(rows, np.ones(len(models)), rcond=None)
        if scale <= 0 or not np.isfinite(fixed):
            raise InputError(
                "The latency table contradicts itself: whole models do not get slower with their layers. The device "
                "was too busy; measure again."
            )
        return float(fixed), float(scale)

    def _sum(self, ranks: Mapping[str, Rank], pivoted: Collection[str] = ()) -> float:
        return sum(
            one.materialized(ranks.get(name, "dense"), pivoted=name in pivoted) for name, one in self._sites.items()
        )

    def layer_ns(self, name: str, rank: Rank) -> int:
        """What a layer contributes at `rank` in its fastest form, in whole nanoseconds, so that sums are exact."""
        if (name, rank) not in self._layer_ns:
            site = self._sites[name]
            ms = site.materialized(rank, pivoted=site.pivots(rank))
            self._layer_ns[name, rank] = round(NANOSECONDS * self.scale * ms)
        return self._layer_ns[name, rank]

    def pivoted(self, ranks: Mapping[str, Rank]) -> tuple[str, ...]:
        """The layers whose pivoted form is the fastest one."""
        return tuple(name for name, rank in ranks.items() if self._sites[name].pivots(rank))

    @property
    def fixed_ns(self) -> int:
        """What no rank changes, in nanoseconds."""
        return round(NANOSECONDS * self.fixed_ms)

    def ns(self, ranks: Mapping[str, Rank]) -> int:
        """Predicted latency of one batch in nanoseconds, each layer in its fastest form; without a rank it is dense."""
        return self.fixed_ns + sum(self.layer_ns(name, ranks.get(name, "dense")) for name in self._sites)

    def ms(self, ranks: Mapping[str, Rank]) -> float:
        """Predicted latency of one batch, in milliseconds."""
        return self.ns(ranks) / NANOSECONDS

    @cached_property
    def dense_ms(self) -> float:
        return self.ms({})

    def errors(self) -> dict[str, float]:
        """Relative error of the prediction of each measured model when the line is fitted to the others."""
        found = {}
        for left_out in self.measured:
            fixed, scale = self._fit([one for one in self.measured if one is not left_out])
            found[left_out.name] = (fixed + scale * self._sum(left_out.ranks, left_out.pivoted)) / left_out.ms - 1
        return found
