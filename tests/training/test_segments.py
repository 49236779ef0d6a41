"""Components above the ranks of a step stay as they are, bit for bit, whatever AdamW remembers of them."""

import copy

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from flora.lowrank.supernet import elastic_layers, set_ranks
from flora.training.segments import RankSegments
from tests.samples import random_images

RANKS = (8, 24, "dense")
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}


def choices_of(supernet: nn.Module) -> dict:
    return dict.fromkeys(elastic_layers(supernet), RANKS)


def step(supernet: nn.Module, optimizer, segments: RankSegments | None, rank) -> None:
    layers = elastic_layers(supernet)
    set_ranks(supernet, dict.fromkeys(layers, rank))
    supernet.zero_grad(set_to_none=True)
    supernet(random_images(4)).square().mean().backward()
    if segments:
        segments.take_gradients({name: layer.rank for name, layer in layers.items()})
    optimizer.step()


def tails(supernet: nn.Module, rank: int) -> list[torch.Tensor]:
    parts = []
    for layer in elastic_layers(supernet).values():
        parts += [layer.down[rank:], layer.up[:, rank:]]
        if layer.inner_bias is not None:
            parts.append(layer.inner_bias[rank:])
    return [part.detach().clone() for part in parts]


def optimizer_for(supernet: nn.Module, segments: RankSegments | None, name: str = "adamw"):
    parameters = list(supernet.parameters())
    return create_optimizer_v2(segments.in_place_of(parameters) if segments else parameters, name, **SETTINGS)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_the_tail_does_not_move_below_its_rank(supernet: nn.Module, name: str):
    segments = RankSegments(supernet, choices_of(supernet))
    optimizer = optimizer_for(supernet, segments, name)
    step(supernet, optimizer, segments, "dense")  # moments of the tail are no longer zero
    before, heads = tails(supernet, 8), [layer.down[:8].detach().clone() for layer in elastic_layers(supernet).values()]
    for _ in range(3):
        step(supernet, optimizer, segments, 8)
    assert all(torch.equal(a, b) for a, b in zip(before, tails(supernet, 8), strict=True))
    after = [layer.down[:8] for layer in elastic_layers(supernet).values()]
    assert not any(torch.equal(a, b) for a, b in zip(heads, after, strict=True))


def test_without_segments_adamw_moves_the_tail(supernet: nn.Module):
    optimizer = optimizer_for(supernet, None)
    step(supernet, optimizer, None, "dense")
    before = tails(supernet, 8)
    step(supernet, optimizer, None, 8)
    assert not any(torch.equal(a, b) for a, b in zip(before, tails(supernet, 8), strict=True))


def test_the_step_count_of_the_tail_stands_still(supernet: nn.Module):
    segments = RankSegments(supernet, choices_of(supernet))
    optimizer = optimizer_for(supernet, segments)
    step(supernet, optimizer, segments, "dense")
    for _ in range(4):
        step(supernet, optimizer, segments, 8)
    layer = next(iter(elastic_layers(supernet).values()))
    first, *others = segments.in_place_of([layer.down])
    assert [int(optimizer.state[part]["step"]) for part in (first, *others)] == [5, 1, 1]


def test_at_full_rank_segments_are_plain_adamw(supernet: nn.Module):
    plain = copy.deepcopy(supernet)
    segments = RankSegments(supernet, choices_of(supernet))
    ours, theirs = optimizer_for(supernet, segments), optimizer_for(plain, None)
    for _ in range(3):
        step(supernet, ours, segments, "dense")
        step(plain, theirs, None, "dense")
    for a, b in zip(supernet.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_segments_cover_each_factor_once_and_share_its_storage(supernet: nn.Module):
    segments = RankSegments(supernet, choices_of(supernet))
    for layer in elastic_layers(supernet).values():
        for factor, dim in ((layer.down, 0), (layer.up, 1)):
            parts = segments.in_place_of([factor])
            assert torch.equal(torch.cat([part.data for part in parts], dim), factor.data)
            parts[-1].data.fill_(7.0)
            assert (factor.narrow(dim, factor.shape[dim] - 1, 1) == 7).all()
