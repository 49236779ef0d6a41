"""Uniform ranks: one ratio for all layers, and the largest one within a MACs budget."""

import itertools
import random

import pytest

from flora.errors import InputError
from flora.ranks.cost import ModelCost
from flora.ranks.uniform import uniform_ranks, uniform_ranks_for_macs
from tests.samples import cost_of

UNEVEN = cost_of((48, 144, 50), (48, 192, 50), (192, 48, 50), (30, 90, 13), (7, 7, 200), (3, 100, 9))


def _steps(cost: ModelCost) -> list[float]:
    """One ratio inside each interval on which `uniform_ranks` is constant, ascending."""
    edges = sorted({(k + 0.5) / layer.full_rank for layer in cost.layers for k in range(layer.full_rank)} | {0, 1})
    return [(low + high) / 2 for low, high in itertools.pairwise(edges)]


def test_every_layer_gets_the_same_share():
    ranks = uniform_ranks(UNEVEN, 0.25)
    assert list(ranks.values()) == [12, 12, 12, round(7.5), 2, 1]


def test_the_whole_share_is_dense():
    assert uniform_ranks(UNEVEN, 1) == UNEVEN.dense_ranks


def test_the_smallest_share_is_rank_one():
    assert set(uniform_ranks(UNEVEN, 1e-9).values()) == {1}


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio: float):
    with pytest.raises(InputError, match=str(ratio)):
        uniform_ranks(UNEVEN, ratio)


@pytest.mark.parametrize("seed", range(30))
def test_a_budget_is_met_and_the_next_larger_step_is_above_it(seed: int):
    budget = random.Random(seed).randint(UNEVEN.smallest_macs, UNEVEN.dense_macs - 1)
    macs = UNEVEN.macs(uniform_ranks_for_macs(UNEVEN, budget))
    above = [cost for ratio in _steps(UNEVEN) if (cost := UNEVEN.macs(uniform_ranks(UNEVEN, ratio))) > macs]
    assert macs <= budget < min(above)


def test_the_smallest_and_the_dense_budget_are_met_exactly(vit_cost: ModelCost):
    for budget in (vit_cost.smallest_macs, vit_cost.dense_macs):
        assert vit_cost.macs(uniform_ranks_for_macs(vit_cost, budget)) == budget


def test_a_budget_above_dense_is_dense(vit_cost: ModelCost):
    assert uniform_ranks_for_macs(vit_cost, 10 * vit_cost.dense_macs) == vit_cost.dense_ranks


def test_a_budget_below_the_smallest_model_is_refused_with_what_is_possible(vit_cost: ModelCost):
    with pytest.raises(InputError, match=f"{vit_cost.smallest_macs / 1e6:.1f} MMACs"):
        uniform_ranks_for_macs(vit_cost, vit_cost.smallest_macs - 1)
