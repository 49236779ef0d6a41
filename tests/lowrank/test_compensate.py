"""Compensation: factors fitted to what the layers of the compact model receive, so that its errors do not add up."""

import copy

import pytest
import torch
from torch import nn

from flora.lowrank.compensate import _fit, _stream, _Sums, compensate
from flora.lowrank.materialize import materialize, pair
from flora.lowrank.replay import Replay
from flora.lowrank.statistics import frozen
from flora.ranks.cost import Rank
from tests.samples import random_images, tiny_model

IMAGES = random_images(48, seed=3)


def batches():
    return iter(IMAGES.split(16))


def ranks_of(cost, share: float) -> dict[str, Rank]:
    return {layer.name: max(1, int(share * layer.full_rank)) for layer in cost.layers}


@torch.no_grad()
def distance(model: nn.Module, dense: nn.Module, images: torch.Tensor) -> float:
    return (model(images) - dense(images)).square().mean().item()


def test_a_compensated_model_is_nearer_to_the_dense_one_on_images_that_it_was_not_fitted_to(family_supernet):
    dense, supernet, cost = family_supernet
    compact = materialize(supernet, ranks_of(cost, 0.4))
    fitted, seen = copy.deepcopy(compact), []
    compensate(fitted, dense, list(cost.shapes), batches, on_layer=lambda done, of: seen.append((done, of)))
    unseen = random_images(32, seed=4)
    assert distance(fitted, dense, unseen) < 0.7 * distance(compact, dense, unseen)
    assert seen == [(i + 1, len(cost.layers)) for i in range(len(cost.layers))]
    shapes = {name: tensor.shape for name, tensor in compact.state_dict().items()}
    assert {name: tensor.shape for name, tensor in fitted.state_dict().items()} == shapes
    assert all(parameter.requires_grad for parameter in (*fitted.parameters(), *dense.parameters()))


def test_layers_that_stayed_dense_and_the_dense_model_are_not_touched(family_supernet):
    dense, supernet, cost = family_supernet
    first = next(iter(cost.shapes))
    compact = materialize(supernet, ranks_of(cost, 0.4) | {first: "dense"})
    before = {name: tensor.clone() for name, tensor in compact.state_dict().items()}
    before_dense = copy.deepcopy(dense.state_dict())
    compensate(compact, dense, list(cost.shapes), batches)
    factors = {name for name in before if name.endswith((".down.weight", ".up.weight", ".up.bias"))}
    for name, tensor in compact.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in factors)
    torch.testing.assert_close(dense.state_dict(), before_dense, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["vit", "deit3", "swin"])
def test_the_stream_is_found_behind_the_layers_that_are_added_to_it(family):
    """Also through the scale of a DeiT-3 block, and through the windows of a Swin block."""
    dense = tiny_model(family)
    for name, parameter in dense.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    block = "layers.0.blocks.1" if family == "swin" else "blocks.1"
    names = [block]
    replay = Replay(dense, names, batches)
    with frozen(dense):
        places = {
            kind: _stream(dense, replay, IMAGES[:16], block, f"{block}.{kind}")
            for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        }
    assert places["attn.qkv"] is None
    assert places["mlp.fc1"] is None
    assert (places["attn.proj"].module, places["attn.proj"].enters) == (f"{block}.norm2", True)
    assert (places["mlp.fc2"].module, places["mlp.fc2"].enters) == (block, False)


@torch.no_grad()
def test_at_the_rank_of_what_is_wanted_the_fit_is_exact_with_many_tokens():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 200_000, 6, generator=generator) + 3
    low_rank = torch.randn(8, 2, generator=generator) @ torch.randn(2, 6, generator=generator)
    bias = torch.randn(8, generator=generator)
    weights = torch.rand(1, 200_000, generator=generator)
    layer = pair(nn.Linear(6, 2, bias=False), nn.Linear(2, 8))
    sums = _Sums(6, 8, torch.device("cpu"))
    for part, weight in zip(x.split(50_000, dim=1), weights.split(50_000, dim=1), strict=True):
        sums.add(part, part @ low_rank.T + bias, weight)
    assert sums.effective_tokens == pytest.approx(200_000 * 3 / 4, rel=0.01)
    _fit(*layer, torch.zeros(8, 6), sums)
    torch.testing.assert_close(layer(x[0]), x[0] @ low_rank.T + bias, rtol=0, atol=1e-2)


@torch.no_grad()
def test_few_tokens_do_not_lead_far_away_from_the_trained_layer():
    """With one token, a least-squares fit could be anything; what is kept is the best part of the layer itself."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(8, 6, generator=generator)
    x = torch.randn(1, 3, 6, generator=generator)
    layer = pair(nn.Linear(6, 5, bias=False), nn.Linear(5, 8))
    sums = _Sums(6, 8, torch.device("cpu"))
    sums.add(x, x @ dense.T + 0.5 * torch.randn(1, 3, 8, generator=generator), torch.ones(1, 3))
    _fit(*layer, dense, sums)
    fitted = layer.up.weight @ layer.down.weight
    assert (fitted - dense).norm() < 0.5 * dense.norm()


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_inputs_that_never_change_are_no_error(bias):
    layer = pair(nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=bias))
    sums = _Sums(6, 8, torch.device("cpu"))
    sums.add(torch.ones(1, 5, 6), torch.ones(1, 5, 8), torch.ones(1, 5))
    _fit(*layer, torch.randn(8, 6), sums)
    output = layer(torch.ones(1, 6))
    assert output.isfinite().all()
    if bias:  # which alone can give what is wanted
        torch.testing.assert_close(output, torch.ones(1, 8), rtol=0, atol=1e-4)
