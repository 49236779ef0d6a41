"""A linear layer whose rank can be changed at any time: the nested factors of the paper's supernet.

Slices are views, so training at rank r trains the first r components, which every larger rank contains (gradient
sharing), and leaves the others without gradient. The active rank is a plain integer: a state dict holds weights only.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from flora.errors import InputError
from flora.lowrank.factorize import Factors
from flora.ranks.cost import Rank, break_even_rank


class ElasticLinear(nn.Module):
    """y = up[:, :r] (down[:r] x + inner_bias[:r]) + bias, at an active rank r.

    At or above the break-even rank the factors are multiplied first, which is then the cheaper way.
    """

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        self.down = nn.Parameter(factors.down)
        self.up = nn.Parameter(factors.up)
        self.inner_bias = None if factors.inner_bias is None else nn.Parameter(factors.inner_bias)
        self.bias = None if factors.bias is None else nn.Parameter(factors.bias)
        self.full_rank, self.in_features = factors.down.shape
        self.out_features = factors.up.shape[0]
        self.rank = self.full_rank

    def allows(self, rank: Rank) -> bool:
        """Whether `rank` is "dense" or an integer from 1 to the full rank."""
        return rank == "dense" or (type(rank) is int and 1 <= rank <= self.full_rank)

    def set_rank(self, rank: Rank) -> None:
        """Make `rank` active; "dense" is the full rank."""
        if not self.allows(rank):
            raise InputError(f'A rank lies between 1 and {self.full_rank}, or is "dense"; got {rank}.')
        self.rank = self.full_rank if rank == "dense" else rank

    @property
    def is_factored(self) -> bool:
        return self.rank < break_even_rank(self.in_features, self.out_features)

    def sliced(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Views of `down` [r, in], `up` [out, r] and `inner_bias` [r] at the active rank."""
        inner_bias = None if self.inner_bias is None else self.inner_bias[: self.rank]
        return self.down[: self.rank], self.up[:, : self.rank], inner_bias

    def folded_bias(self) -> Tensor | None:
        """The one bias [out] that does the work of both: up inner_bias + bias."""
        _, up, inner_bias = self.sliced()
        if inner_bias is None or self.bias is None:
            return self.bias
        return self.bias + up @ inner_bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        down, up, _ = self.sliced()
        if self.is_factored:
            return F.linear(F.linear(x, down), up, self.folded_bias())
        return F.linear(x, up @ down, self.folded_bias())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}/{self.full_rank}"
