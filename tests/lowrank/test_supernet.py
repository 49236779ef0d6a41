"""The supernet equals the dense model at full rank, and its ranks are set all or not at all."""

import pytest
import torch
from torch import nn

from flora.errors import InputError
from flora.lowrank.elastic import ElasticLinear
from flora.lowrank.supernet import active_ranks, build_supernet, elastic_layers, set_ranks
from flora.lowrank.targets import find_targets, trace_cost
from flora.ranks.cost import ModelCost
from tests.samples import IMAGE, random_images, random_ranks, smallest, tiny_model

LAYER = "blocks.1.mlp.fc1"


def _current(supernet: nn.Module) -> dict[str, int]:
    return {name: layer.rank for name, layer in elastic_layers(supernet).items()}


@torch.no_grad()
def test_a_supernet_at_full_rank_equals_the_dense_model(family_supernet):
    dense, supernet, cost = family_supernet
    images = random_images(3, seed=1)
    with active_ranks(supernet, cost.dense_ranks):
        assert (supernet(images) - dense(images)).abs().max() < 1e-5 * dense(images).abs().max()


@torch.no_grad()
def test_svd_needs_no_images():
    model, images = tiny_model(), random_images(3)
    expected = model(images)
    build_supernet(model, trace_cost(model, find_targets(model), IMAGE), method="svd")
    assert torch.allclose(model(images), expected, atol=1e-4)


@torch.no_grad()
def test_activation_loses_less_than_svd_on_the_calibration_images(vit_cost: ModelCost):
    """At the first layer, whose input no rank changes, by the law; taken here on its output."""
    images, name = random_images(8), "blocks.0.attn.qkv"
    errors = {}
    for method in ("svd", "activation"):
        dense, model = tiny_model(), tiny_model()
        build_supernet(model, vit_cost, method=method, batches=[images] if method == "activation" else None)
        model.get_submodule(name).set_rank(8)
        tokens = dense.blocks[0].norm1(dense._pos_embed(dense.patch_embed(images)))
        errors[method] = (model.get_submodule(name)(tokens) - dense.get_submodule(name)(tokens)).square().mean().item()
    assert errors["activation"] < errors["svd"]


def test_exactly_the_targets_become_elastic(supernet: nn.Module, vit_cost: ModelCost):
    assert list(elastic_layers(supernet)) == list(vit_cost.shapes)


def test_the_spectrum_of_each_layer_is_returned(vit_cost: ModelCost):
    spectra = build_supernet(tiny_model(), vit_cost, batches=[random_images(4)])
    assert {name: len(spectrum) for name, spectrum in spectra.items()} == dict.fromkeys(vit_cost.shapes, 48)


def test_each_layer_is_reported_as_it_is_factorized(vit_cost: ModelCost):
    reported: list[str] = []
    build_supernet(tiny_model(), vit_cost, method="svd", on_layer=reported.append)
    assert reported == list(vit_cost.shapes)


def test_activation_without_images_names_the_layers(vit_cost: ModelCost):
    with pytest.raises(InputError, match=r"no statistics for blocks\.0\.attn\.qkv"):
        build_supernet(tiny_model(), vit_cost, method="activation")


def test_svd_with_images_is_refused(vit_cost: ModelCost):
    with pytest.raises(InputError, match="svd looks at no images"):
        build_supernet(tiny_model(), vit_cost, method="svd", batches=[random_images(2)])


def test_an_unknown_method_is_refused_with_those_there_are(vit_cost: ModelCost):
    with pytest.raises(InputError, match=r"'pca'.*activation or svd"):
        build_supernet(tiny_model(), vit_cost, method="pca")


def test_nothing_is_replaced_when_a_layer_fails(vit_cost: ModelCost):
    model = tiny_model()
    with torch.no_grad():
        model.blocks[1].norm2.weight[0] = float("nan")
    with pytest.raises(InputError):
        build_supernet(model, vit_cost, batches=[random_images(2)])
    assert not elastic_layers(model)


def test_a_partial_config_is_refused_by_name_and_changes_no_rank(supernet: nn.Module, vit_cost: ModelCost):
    ranks = smallest(vit_cost)
    del ranks[LAYER]
    with pytest.raises(InputError, match=LAYER):
        set_ranks(supernet, ranks)
    assert set(_current(supernet).values()) == {48}


def test_an_unexpected_layer_is_refused_by_name_and_changes_no_rank(supernet: nn.Module, vit_cost: ModelCost):
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.proj"):
        set_ranks(supernet, {**smallest(vit_cost), "blocks.0.attn.proj": 4})
    assert set(_current(supernet).values()) == {48}


@pytest.mark.parametrize("rank", [0, -3, 49])
def test_a_rank_out_of_bounds_is_refused_by_name_and_changes_no_rank(supernet, vit_cost, rank: int):
    with pytest.raises(InputError, match=f"{LAYER}: {rank}"):
        set_ranks(supernet, {**smallest(vit_cost), LAYER: rank})
    assert set(_current(supernet).values()) == {48}


def test_active_ranks_are_restored(supernet: nn.Module, vit_cost: ModelCost):
    before = random_ranks(vit_cost, 1)
    set_ranks(supernet, before)
    current = _current(supernet)
    with active_ranks(supernet, smallest(vit_cost)) as same:
        assert same is supernet
        assert _current(supernet) == smallest(vit_cost)
    assert _current(supernet) == current


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_active_ranks_are_restored_after_an_exception(supernet, vit_cost, error: type[BaseException]):
    with pytest.raises(error), active_ranks(supernet, smallest(vit_cost)):
        raise error
    assert set(_current(supernet).values()) == {48}


def test_active_ranks_may_be_nested(supernet: nn.Module, vit_cost: ModelCost):
    with active_ranks(supernet, dict.fromkeys(vit_cost.shapes, 20)):
        with active_ranks(supernet, smallest(vit_cost)):
            pass
        assert set(_current(supernet).values()) == {20}


def test_training_at_a_small_config_leaves_all_other_components(supernet: nn.Module, vit_cost: ModelCost):
    before = {name: layer.down.detach().clone() for name, layer in elastic_layers(supernet).items()}
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1)
    with active_ranks(supernet, dict.fromkeys(vit_cost.shapes, 5)):
        supernet(random_images(2)).square().mean().backward()
        optimizer.step()
    for name, layer in elastic_layers(supernet).items():
        assert isinstance(layer, ElasticLinear)
        assert torch.equal(layer.down[5:], before[name][5:])
        assert not torch.equal(layer.down[:5], before[name][:5])
