"""The analytic cost equals what is counted on the materialized model, is monotone, and is never above dense."""

import random
import timeit

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flora.errors import InputError
from flora.lowrank.materialize import materialize
from flora.ranks.cost import LayerShape, ModelCost
from tests.samples import cost_of, raised, random_images, random_ranks, smallest


@torch.no_grad()
def _counted_macs(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(random_images(1))
    return counter.get_total_flops() // 2


def _counted_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _shape(in_features: int, out_features: int) -> LayerShape:
    return LayerShape(name="fc", in_features=in_features, out_features=out_features, tokens=3)


@pytest.mark.parametrize("seed", range(3))
def test_cost_equals_torchs_count_of_the_materialized_model(family_supernet, seed: int):
    _, supernet, cost = family_supernet
    ranks = random_ranks(cost, seed)
    model = materialize(supernet, ranks)
    assert cost.macs(ranks) == _counted_macs(model)
    assert cost.params(ranks) == _counted_params(model)


def test_dense_cost_equals_torchs_count_of_the_dense_model(family_supernet):
    dense, _, cost = family_supernet
    assert (cost.dense_macs, cost.dense_params) == (_counted_macs(dense), _counted_params(dense))


def test_smallest_cost_is_that_of_rank_one_everywhere(vit_cost: ModelCost):
    assert vit_cost.smallest_macs == vit_cost.macs(smallest(vit_cost))


def test_cost_is_monotone_in_each_rank(vit_cost: ModelCost):
    for seed in range(20):
        ranks = random_ranks(vit_cost, seed)
        for name in ranks:
            higher = raised(ranks, name, vit_cost)
            assert vit_cost.macs(ranks) <= vit_cost.macs(higher)
            assert vit_cost.params(ranks) <= vit_cost.params(higher)


def test_cost_is_strictly_monotone_up_to_break_even(vit_cost: ModelCost):
    for layer in vit_cost.layers:
        macs = [layer.macs(rank) for rank in range(1, layer.break_even_rank + 1)]
        assert macs == sorted(set(macs))


def test_cost_is_never_above_dense(vit_cost: ModelCost):
    for layer in vit_cost.layers:
        assert max(layer.macs(rank) for rank in range(1, layer.full_rank + 1)) == layer.macs("dense")


def test_break_even_is_the_smallest_rank_at_which_factors_do_not_pay():
    rng = random.Random(0)
    for _ in range(300):
        i, o = rng.randint(1, 60), rng.randint(1, 60)
        assert _shape(i, o).break_even_rank == next(r for r in range(1, i * o + 1) if r * (i + o) >= i * o)


def test_a_rank_at_break_even_is_held_dense_and_the_one_below_in_factors():
    layer = _shape(48, 144)
    assert (layer.break_even_rank, layer.full_rank) == (36, 48)
    assert (layer.is_factored(35), layer.is_factored(36), layer.is_factored("dense")) == (True, False, False)


def test_a_shape_without_tokens_is_refused_by_name():
    with pytest.raises(InputError, match="fc1"):
        LayerShape(name="fc1", in_features=4, out_features=4, tokens=0)


def test_a_config_of_36_layers_is_costed_in_microseconds():
    cost = cost_of(*[(768, 2304, 197), (768, 3072, 197), (3072, 768, 197)] * 12)
    ranks = random_ranks(cost, 0)
    cost.macs(ranks)
    seconds = min(timeit.repeat(lambda: cost.macs(ranks), number=20, repeat=20)) / 20
    assert seconds < 200e-6
