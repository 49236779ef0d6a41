"""The pivoted form is the same product with fewer weights, whatever the layer, the rank and the window."""

import copy

import pytest
import torch
from torch import nn

from flora.lowrank.materialize import materialize, pair
from flora.lowrank.pivot import PivotedLinear, pivot_layers
from flora.lowrank.targets import trace_cost
from tests.samples import IMAGE, random_images


def two_factors(down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Module:
    rank, in_features = down.shape
    layer = pair(nn.Linear(in_features, rank, bias=False), nn.Linear(rank, len(up), bias=bias is not None))
    state = {"down.weight": down, "up.weight": up} | ({} if bias is None else {"up.bias": bias})
    layer.load_state_dict(state)
    return nn.ModuleDict({"layer": layer})


@torch.no_grad()
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_pivoted_model_gives_the_same_logits_from_as_many_macs_as_it_is_said_to_cost(family_supernet, share):
    _, supernet, cost = family_supernet
    ranks = {layer.name: max(1, int(share * layer.full_rank)) for layer in cost.layers}
    model = materialize(supernet, ranks, list(ranks))
    pivoted = copy.deepcopy(model)
    assert pivot_layers(pivoted, ranks) == []
    images = random_images(3, seed=2)
    expected = model(images)
    assert (pivoted(images) - expected).abs().max() < 1e-4 * max(1, expected.abs().max())
    counted = trace_cost(pivoted, [], IMAGE)
    assert counted.dense_macs == cost.macs(ranks, list(ranks)) < cost.macs(ranks)
    assert counted.dense_params == cost.params(ranks, list(ranks)) < cost.params(ranks)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dead", ["none", "first", "last", "both"])
def test_outputs_that_are_always_zero_are_not_taken_as_pivots(bias, dead):
    generator = torch.Generator().manual_seed(0)
    down, up, x = (torch.randn(*shape, generator=generator) for shape in ((4, 9), (20, 4), (5, 9)))
    up[:1] *= dead not in ("first", "both")
    up[-1:] *= dead not in ("last", "both")
    model = two_factors(down, up, torch.randn(20, generator=generator) if bias else None)
    expected = model["layer"](x)
    assert pivot_layers(model, ["layer"]) == []
    layer = model["layer"]
    assert isinstance(layer, PivotedLinear)
    assert sum(len(part) > 0 for part in (layer.above, layer.below)) == (2 if dead == "both" else 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert layer.pivot.shape == (4, 9)
    assert len(layer.above) + len(layer.below) == 16


def test_a_layer_without_good_pivots_keeps_two_factors():
    """One row in eight is all that the output depends on: no window of four adjacent ones has four of these."""
    up = torch.zeros(32, 4)
    up[::8] = torch.eye(4)
    model = two_factors(torch.randn(4, 9, generator=torch.Generator().manual_seed(0)), up)
    before = copy.deepcopy(model)
    assert pivot_layers(model, ["layer"]) == ["layer"]
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)


@torch.no_grad()
def test_such_a_layer_becomes_dense_where_two_factors_are_not_cheaper():
    up = torch.zeros(32, 8)
    up[::4] = torch.eye(8)
    down = torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
    model = two_factors(down, up, torch.ones(32))
    assert pivot_layers(model, ["layer"]) == ["layer"]
    assert type(model["layer"]) is nn.Linear
    torch.testing.assert_close(model["layer"].weight, up @ down)
    torch.testing.assert_close(model["layer"].bias, torch.ones(32))
