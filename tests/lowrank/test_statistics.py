"""Streamed statistics equal those of all inputs at once, in any batches and groups, and bad input is named."""

import weakref
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from flora.errors import InputError
from flora.lowrank.statistics import (
    InputStatistics,
    _with_weights,
    collect_statistics,
    layer_groups,
    token_weights,
)
from flora.lowrank.targets import find_targets, trace_cost
from tests.samples import IMAGE, cost_of, random_images, tiny_model

IMAGES = random_images(12)


def _collect(model: nn.Module, batches: Iterable[Tensor], name: str) -> InputStatistics:
    return collect_statistics(model, batches, {name: model.get_submodule(name)})[name]


@torch.inference_mode()
def _inputs(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """All rows that a layer receives, float64 [tokens, in]."""
    received: list[Tensor] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0].flatten(end_dim=-2).double()))
    model(images)
    hook.remove()
    return torch.cat(received)


def _assert_equal(one: dict[str, InputStatistics], other: dict[str, InputStatistics], rtol: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name, statistics in one.items():
        assert statistics.tokens == other[name].tokens
        for mine, its in ((statistics.mean, other[name].mean), (statistics.second_moment, other[name].second_moment)):
            assert (mine - its).norm() <= rtol * its.norm()


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_statistics_equal_those_of_all_inputs_at_once(family: str):
    model = tiny_model(family)
    collected = collect_statistics(model, IMAGES.split(5), find_targets(model))
    expected = {}
    for name in find_targets(model):
        rows = _inputs(model, name, IMAGES)
        expected[name] = InputStatistics(tokens=len(rows), mean=rows.mean(0), second_moment=rows.T @ rows / len(rows))
    _assert_equal(collected, expected)


def test_covariance_is_the_centred_second_moment():
    model, name = tiny_model(), "blocks.1.mlp.fc1"
    statistics = _collect(model, [IMAGES], name)
    rows = _inputs(model, name, IMAGES)
    expected = torch.cov(rows.T, correction=0)
    assert (statistics.covariance - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_statistics_do_not_depend_on_the_batch_size(batch_size: int):
    model = tiny_model()
    layers = find_targets(model)
    _assert_equal(
        collect_statistics(model, IMAGES.split(batch_size), layers), collect_statistics(model, IMAGES.split(4), layers)
    )


def test_sums_are_kept_in_double_precision():
    statistics = _collect(tiny_model(), [IMAGES], "blocks.0.attn.qkv")
    assert (statistics.mean.dtype, statistics.second_moment.dtype) == (torch.float64, torch.float64)


def test_a_small_variance_beside_a_large_mean_survives():
    """Deviations of 1 around 1000: single precision sums would leave little of the variance."""
    rows = 1000 + torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    statistics = _collect(nn.Sequential(nn.Linear(8, 8)), rows.split(16), "0")
    expected = torch.cov(rows.double().T, correction=0)
    assert (statistics.covariance - expected).norm() < 0.1 * expected.norm()


def test_layers_in_groups_give_the_same_as_all_at_once():
    model = tiny_model()
    layers = find_targets(model)
    cost = trace_cost(model, layers, IMAGE)
    groups = list(layer_groups(cost.layers, most_bytes=40_000))
    assert len(groups) > 2
    grouped = {}
    for group in groups:
        grouped |= collect_statistics(model, IMAGES.split(4), {name: layers[name] for name in group})
    _assert_equal(grouped, collect_statistics(model, IMAGES.split(4), layers), rtol=0)


def test_groups_hold_every_layer_once_in_order_within_the_limit():
    layers = cost_of((10, 1, 1), (10, 1, 1), (30, 1, 1), (5, 1, 1), (20, 1, 1), (20, 1, 1)).layers
    limit = 8 * 20**2
    groups = list(layer_groups(layers, most_bytes=limit))
    inputs = {layer.name: layer.in_features for layer in layers}
    assert [name for group in groups for name in group] == list(inputs)
    assert all(len(group) == 1 or sum(8 * inputs[name] ** 2 for name in group) <= limit for group in groups)
    assert [len(group) for group in groups] == [2, 1, 1, 1, 1]


def test_no_batch_is_kept_once_the_next_is_read():
    model, name = tiny_model(), "blocks.1.mlp.fc2"
    activations: list[weakref.ref] = []
    alive: list[int] = []
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda _, inputs: activations.append(weakref.ref(inputs[0])))

    def batches():
        for batch in IMAGES.split(2):
            alive.append(sum(reference() is not None for reference in activations))
            yield batch

    _collect(model, batches(), name)
    assert alive == [0] * 6


def test_an_activation_that_is_not_finite_names_the_layer():
    model = tiny_model()
    with torch.no_grad():
        model.blocks[1].norm2.weight[3] = float("nan")
    with pytest.raises(InputError, match=r"blocks\.1\.mlp\.fc1") as error:
        collect_statistics(model, [IMAGES], find_targets(model))
    assert "blocks.0" not in str(error.value)
    assert "blocks.1.attn" not in str(error.value)


def test_no_images_are_refused():
    with pytest.raises(InputError, match="no calibration images"):
        _collect(tiny_model(), [], "blocks.0.attn.qkv")


def test_collecting_leaves_the_model_as_it_was_even_when_it_fails():
    model = tiny_model().train()
    with pytest.raises(AssertionError):
        _collect(model, [torch.zeros(1, 1, 5, 5)], "blocks.0.attn.qkv")
    assert model.training
    assert not model.blocks[0].attn.qkv._forward_pre_hooks


def test_tokens_that_the_answer_does_not_depend_on_weigh_nothing():
    """The last block of this ViT is read at the class token alone; the first one at every token."""
    model, image = tiny_model(), IMAGES[:1]
    names = [f"blocks.{block}.mlp.fc1" for block in (0, 1)]
    layers = {name: model.get_submodule(name) for name in names}
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()[0]}))
        for name, layer in layers.items()
    ]
    statistics = collect_statistics(model, [image], layers, weigh_tokens=True)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(statistics[names[1]].mean.float(), inputs[names[1]][0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(statistics[names[0]].mean.float(), inputs[names[0]][0], rtol=1e-2, atol=1e-2)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_weights_do_not_depend_on_the_batch_size():
    model = tiny_model()
    layers = find_targets(model)
    once = collect_statistics(model, [IMAGES], layers, weigh_tokens=True)
    often = collect_statistics(model, IMAGES.split(4), layers, weigh_tokens=True)
    for name in layers:
        torch.testing.assert_close(often[name].mean, once[name].mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(often[name].covariance, once[name].covariance, rtol=1e-3, atol=1e-4)


def test_weighing_tokens_keeps_the_activations_of_one_gradient_at_a_time(monkeypatch):
    """All of a batch of 32 would be gigabytes in a large model."""
    model, alive = tiny_model("vit"), []
    layers = find_targets(model)

    def watched(*args):
        assert [inputs for inputs in alive if inputs() is not None] == []
        found = _with_weights(*args)
        alive.extend(weakref.ref(inputs) for inputs, _ in found.values())
        return found

    monkeypatch.setattr("flora.lowrank.statistics._with_weights", watched)
    weights = token_weights(model, [random_images(6)], layers)
    assert len(alive) == 3 * len(layers)
    tokens = trace_cost(model, layers, IMAGE).shapes
    assert {name: len(one) for name, (one,) in weights.items()} == {name: 6 * tokens[name].tokens for name in layers}
