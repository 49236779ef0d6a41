"""A materialized model equals the supernet under its config, and holds stock modules and its own storage only."""

import copy

import pytest
import torch
from torch import nn

from flora.errors import InputError
from flora.lowrank.materialize import materialize
from flora.lowrank.supernet import active_ranks, elastic_layers
from tests.samples import random_images, random_ranks, smallest

CONFIGS = ["smallest", "largest", "at full rank", *range(4)]


def _ranks(cost, config: str | int) -> dict:
    if isinstance(config, int):
        return random_ranks(cost, config)
    named = {
        "smallest": smallest(cost),
        "largest": cost.dense_ranks,
        "at full rank": {layer.name: layer.full_rank for layer in cost.layers},
    }
    return named[config]


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_materialized_model_equals_the_supernet_under_its_config(family_supernet, config: str | int, batch: int):
    _, supernet, cost = family_supernet
    images, ranks = random_images(batch, seed=1), _ranks(cost, config)
    with active_ranks(supernet, ranks):
        expected = supernet(images)
    logits = materialize(supernet, ranks)(images)
    assert expected.std() > 0.01
    assert (logits - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("config", CONFIGS)
def test_only_stock_modules_remain(family_supernet, config: str | int):
    dense, supernet, cost = family_supernet
    model = materialize(supernet, _ranks(cost, config))
    assert {type(module) for module in model.modules()} <= {type(module) for module in dense.modules()} | {
        nn.Sequential
    }
    assert not any(type(module).__module__.startswith("flora") for module in model.modules())


def test_a_layer_that_is_to_be_pivoted_stays_two_linears_at_any_rank(family_supernet):
    _, supernet, cost = family_supernet
    first, second, *_ = cost.shapes
    ranks = cost.dense_ranks | {first: cost.shapes[first].full_rank - 1}
    model = materialize(supernet, ranks, [first, second])
    assert [type(part) for part in model.get_submodule(first)] == [nn.Linear, nn.Linear]
    assert type(model.get_submodule(second)) is nn.Linear


@pytest.mark.parametrize("config", CONFIGS)
def test_a_layer_is_two_linears_below_break_even_and_one_from_there_on(family_supernet, config: str | int):
    _, supernet, cost = family_supernet
    ranks = _ranks(cost, config)
    model = materialize(supernet, ranks)
    for name, shape in cost.shapes.items():
        layer = model.get_submodule(name)
        if shape.is_factored(ranks[name]):
            assert type(layer) is nn.Sequential
            assert [type(part) for part in layer] == [nn.Linear, nn.Linear]
            assert (layer.down.out_features, layer.down.bias) == (ranks[name], None)
        else:
            assert type(layer) is nn.Linear


def test_the_dense_config_gives_the_dense_state_dict(family_supernet):
    dense, supernet, cost = family_supernet
    state = materialize(supernet, cost.dense_ranks).state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in dense.state_dict().items()
    }
    assert all((tensor - state[name]).abs().max() < 1e-5 for name, tensor in dense.state_dict().items())


def test_the_supernet_is_left_as_it_was(family_supernet):
    _, supernet, cost = family_supernet
    ranks = {name: layer.rank for name, layer in elastic_layers(supernet).items()}
    state = copy.deepcopy(supernet.state_dict())
    materialize(supernet, smallest(cost))
    assert {name: layer.rank for name, layer in elastic_layers(supernet).items()} == ranks
    assert all(torch.equal(tensor, state[name]) for name, tensor in supernet.state_dict().items())


def test_no_storage_is_shared_with_the_supernet(family_supernet):
    _, supernet, cost = family_supernet
    model = materialize(supernet, random_ranks(cost, 0))
    ours = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    its = {tensor.untyped_storage().data_ptr() for tensor in supernet.state_dict().values()}
    assert not ours & its


def test_a_slice_keeps_no_more_memory_than_it_shows(family_supernet):
    _, supernet, cost = family_supernet
    for parameter in materialize(supernet, smallest(cost)).parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


def test_a_materialized_model_can_be_trained(family_supernet):
    _, supernet, cost = family_supernet
    model = materialize(supernet, random_ranks(cost, 0))
    model(random_images(2)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_config_that_does_not_fit_is_refused(family_supernet):
    _, supernet, cost = family_supernet
    ranks = dict(cost.dense_ranks)
    name, _ = ranks.popitem()
    with pytest.raises(InputError, match=name):
        materialize(supernet, ranks)
