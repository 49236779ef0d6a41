"""From a supernet and a rank config to a plain model: stock `nn.Linear` layers only, nothing of flora left inside."""

import copy
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import nn

from flora.lowrank.elastic import ElasticLinear
from flora.lowrank.supernet import active_ranks, elastic_layers
from flora.ranks.cost import Rank


@torch.no_grad()
def materialize(supernet: nn.Module, ranks: Mapping[str, Rank]) -> nn.Module:
    """A new model that equals `supernet` under `ranks`; the supernet is left as it was.

    A layer becomes two linears (`down` without bias, `up` with the folded bias), or one with the dense product where
    its rank is at or above break-even.
    """
    with active_ranks(supernet, ranks):
        # deepcopy takes what its memo already holds, so the large factors are never copied.
        plain = {id(layer): _plain(layer) for layer in elastic_layers(supernet).values()}
        return copy.deepcopy(supernet, plain)


def _plain(layer: ElasticLinear) -> nn.Module:
    down, up, _ = layer.sliced()
    bias = layer.folded_bias()
    if not layer.is_factored:
        return _linear(up @ down, bias)
    return pair(_linear(down, None), _linear(up, bias))


def pair(down: nn.Linear, up: nn.Linear) -> nn.Sequential:
    """The factorized form of a linear layer, with the names that its weights have in every file."""
    return nn.Sequential(OrderedDict(down=down, up=up))


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear
