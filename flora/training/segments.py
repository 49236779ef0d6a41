"""Optimizing only the components that a training step has used.

The gradient of a nested factor is zero outside the active rank, not absent, and AdamW would go on moving what it sees
with a zero gradient: by its momentum, and by weight decay. So the optimizer is given each factor in segments, cut where
the space's ranks lie. They are views of the factor, no copies. Before each step those that lie above the ranks of the
step have no gradient at all, and torch's and timm's optimizers leave such a parameter, its moments and its step count
alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from flora.lowrank.supernet import elastic_layers
from flora.ranks.cost import Rank


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """Components from `start` on of one factor: `view` shares its storage, along `dim`."""

    layer: str
    factor: nn.Parameter
    dim: int
    start: int
    view: nn.Parameter


class RankSegments:
    """The factors of a supernet's elastic layers, in segments that a rank of the space uses whole or not at all."""

    def __init__(self, supernet: nn.Module, choices: Mapping[str, tuple[Rank, ...]]) -> None:
        self._segments: dict[nn.Parameter, list[_Segment]] = {}
        for name, layer in elastic_layers(supernet).items():
            starts = [0, *(rank for rank in choices[name] if rank != "dense")]
            bounds = list(zip(starts, [*starts[1:], layer.full_rank], strict=True))
            for factor, dim in ((layer.down, 0), (layer.up, 1), (layer.inner_bias, 0)):
                if factor is None:
                    continue
                self._segments[factor] = [
                    _Segment(
                        layer=name,
                        factor=factor,
                        dim=dim,
                        start=start,
                        view=nn.Parameter(factor.data.narrow(dim, start, stop - start)),
                    )
                    for start, stop in bounds
                ]

    def in_place_of(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """`parameters`, each factor replaced by its segments: what the optimizer is to be given."""
        replaced: list[nn.Parameter] = []
        for parameter in parameters:
            segments = self._segments.get(parameter)
            replaced += [segment.view for segment in segments] if segments else [parameter]
        return replaced

    def take_gradients(self, used: Mapping[str, int]) -> None:
        """Give each segment its part of the factor's gradient, and none to segments that no rank in `used` reaches.

        `used` is the largest active rank of each layer since the gradients were cleared.
        """
        for segments in self._segments.values():
            for segment in segments:
                gradient = segment.factor.grad
                length = segment.view.shape[segment.dim]
                if gradient is None or segment.start >= used[segment.layer]:
                    segment.view.grad = None
                else:
                    segment.view.grad = gradient.narrow(segment.dim, segment.start, length)
