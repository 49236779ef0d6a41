"""The pivoted form of a low-rank layer: the same product from fewer weights, and so fewer MACs.

Of the outputs of two factors at rank r, r rows decide all others: y = U D x, so with the rows P of U as pivots,
t = (U_P D) x are r outputs themselves, and the others are (U_rest U_P^-1) t. That are r (in + out - r) weights instead
of r (in + out), always fewer than the dense layer has (PIFA, Zhao et al., ICML 2025). Published pivots lie anywhere,
which costs a gather of all outputs; here they are a window of adjacent outputs, so that joining the parts is enough.
"""

import logging
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora.lowrank.materialize import factors_of, product_of
from flora.ranks.cost import break_even_rank

log = logging.getLogger(__name__)

# The Frobenius norm of U_rest U_P^-1, by which rounding errors grow, with which no other window is looked for, and the
# largest one that is taken.
GOOD_NORM, LARGEST_NORM = 300.0, 3000.0
WINDOWS = 8


class PivotedLinear(nn.Module):
    """y = [above t, t, below t] + bias with t = pivot x; `above` and `below` may have no rows."""

    def __init__(self, pivot: Tensor, above: Tensor, below: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.pivot, self.above, self.below = (
            nn.Parameter(weight.contiguous(), requires_grad=False) for weight in (pivot, above, below)
        )
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        t = F.linear(x, self.pivot)
        parts = [F.linear(t, self.above)] if len(self.above) else []
        parts.append(t)
        parts += [F.linear(t, self.below)] if len(self.below) else []
        y = torch.cat(parts, dim=-1)
        return y if self.bias is None else y + self.bias


def pivot_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Give the factorized layers `names` of `model` the pivoted form, in place; returns those that cannot have it.

    That are those for which rounding errors would grow too much with the outputs of any window as pivots. They keep two
    factors, or are multiplied where these are not cheaper.
    """
    left = []
    for name in names:
        down, up = factors_of(model.get_submodule(name))
        pivoted = _pivoted(down.weight, up.weight, up.bias)
        if pivoted is None:
            left.append(name)
            log.warning("%s is not pivoted: no window of its outputs decides the others well enough", name)
            if down.out_features >= break_even_rank(down.in_features, up.out_features):
                model.set_submodule(name, product_of(down, up))
        else:
            model.set_submodule(name, pivoted)
    return left


@torch.no_grad()
def _pivoted(down: Tensor, up: Tensor, bias: Tensor | None) -> PivotedLinear | None:
    """The layer with the window of the smallest norm among those that are tried, None where all norms are too large."""
    wide_down, wide_up = down.double(), up.double()
    rank = down.shape[0]
    best, rest, start = LARGEST_NORM, None, 0
    for first in _windows(len(up), rank):
        others = torch.cat([wide_up[:first], wide_up[first + rank :]])
        found, info = torch.linalg.solve_ex(wide_up[first : first + rank], others, left=False)
        norm = float(found.norm())
        if not info.item() and norm < best:
            best, rest, start = norm, found, first
        if best < GOOD_NORM and first:
            break
    if rest is None:
        return None
    pivot = wide_up[start : start + rank] @ wide_down
    pivot, above, below = (part.to(down.dtype) for part in (pivot, rest[:start], rest[start:]))
    return PivotedLinear(pivot, above, below, None if bias is None else bias.detach())


def _windows(outputs: int, rank: int) -> Iterator[int]:
    """Where windows begin: at both ends, where two parts are joined, and then between them, where it is three."""
    last = outputs - rank
    yield from dict.fromkeys((0, last))
    yield from sorted({last * i // (WINDOWS - 1) for i in range(1, WINDOWS - 1)} - {0, last})
