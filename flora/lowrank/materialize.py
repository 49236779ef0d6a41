"""From a supernet and a rank config to a plain model: stock `nn.Linear` layers only, nothing of flora left inside."""

import copy
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import nn

from flora.lowrank.elastic import ElasticLinear
from flora.lowrank.supernet import active_ranks, elastic_layers
from flora.ranks.cost import Rank


@torch.no_grad()
def materialize(supernet: nn.Module, ranks: Mapping[str, Rank], pivoted: Collection[str] = ()) -> nn.Module:
    """A new model that equals `supernet` under `ranks`; the supernet is left as it was.

    A layer becomes two linears (`down` without bias, `up` with the folded bias), or one with the dense product where
    its rank is at or above break-even. A layer that is to be `pivoted` at export stays two at any rank.
    """
    with active_ranks(supernet, ranks):
        # deepcopy takes what its memo already holds, so the large factors are never copied.
        plain = {
            id(layer): _plain(layer, as_pair=layer.is_factored or (name in pivoted and ranks[name] != "dense"))
            for name, layer in elastic_layers(supernet).items()
        }
        return copy.deepcopy(supernet, plain)


def _plain(layer: ElasticLinear, *, as_pair: bool) -> nn.Module:
    down, up, _ = layer.sliced()
    bias = layer.folded_bias()
    if not as_pair:
        return _linear(up @ down, bias)
    return pair(_linear(down, None), _linear(up, bias))


def pair(down: nn.Linear, up: nn.Linear) -> nn.Sequential:
    """The factorized form of a linear layer, with the names that its weights have in every file."""
    return nn.Sequential(OrderedDict(down=down, up=up))


def factors_of(pair: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """The two linears, `down` and `up`, of a layer in its factorized form."""
    return cast(nn.Linear, pair.get_submodule("down")), cast(nn.Linear, pair.get_submodule("up"))


@torch.no_grad()
def product_of(down: nn.Linear, up: nn.Linear) -> nn.Linear:
    """The two factors as one dense linear."""
    return _linear(up.weight @ down.weight, up.bias)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear
