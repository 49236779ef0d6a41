"""A budget is read exactly, counts what the materialized model has, and is refused at once where it cannot be met."""

import re

import pytest

from flora.errors import InputError
from flora.ranks.budget import WORDS, Budget, check_reachable, macs_budget
from flora.ranks.cost import ModelCost
from flora.ranks.space import space_from_ratios
from tests.samples import random_ranks


@pytest.mark.parametrize(
    ("text", "macs"), [("2.7G", 2_700_000_000), ("800M", 800_000_000), ("5k", 5_000), ("1234", 1234), ("1T", 10**12)]
)
def test_a_number_is_read_with_its_unit(vit_cost: ModelCost, text: str, macs: int):
    assert macs_budget(text, vit_cost) == macs


def test_a_percentage_is_of_the_whole_dense_model(vit_cost: ModelCost):
    assert macs_budget("50%", vit_cost) == vit_cost.dense_macs // 2
    assert macs_budget("100%", vit_cost) == vit_cost.dense_macs


NO_AMOUNT = [
    "",
    "%",
    "G",
    "half",
    "2.7X",
    "2,7G",
    "0%",
    "101%",
    "-5%",
    "0",
    "-3M",
    "nan",
    "nan%",
    "inf",
    "50%%",
    "1e999",
]


@pytest.mark.parametrize("text", NO_AMOUNT)
def test_what_is_no_budget_is_refused_by_its_text(vit_cost: ModelCost, text: str):
    with pytest.raises(InputError, match=f"^{text!r}"):
        macs_budget(text, vit_cost)
    with pytest.raises(InputError, match=f"^'params={text}'"):
        Budget.parse(f"params={text}", vit_cost)


def test_each_kind_is_read_against_its_own_dense_cost(vit_cost: ModelCost):
    assert Budget.parse("macs=100%", vit_cost) == Budget(kind="macs", limit=vit_cost.dense_macs, text="macs=100%")
    assert Budget.parse("params=50%", vit_cost).limit == vit_cost.dense_params // 2
    assert Budget.parse("params=1.5M", vit_cost) == Budget(kind="params", limit=1_500_000, text="params=1.5M")


@pytest.mark.parametrize("text", ["50%", "mac=50%", "latency=3", "", "=5M"])
def test_an_unknown_kind_is_refused_with_what_is_allowed(vit_cost: ModelCost, text: str):
    with pytest.raises(InputError, match=re.escape(repr(text)) + r".*macs=50%.*params=12M"):
        Budget.parse(text, vit_cost)


def test_a_mistyped_kind_is_answered_with_the_near_one(vit_cost: ModelCost):
    with pytest.raises(InputError, match="Did you mean params"):
        Budget.parse("param=5M", vit_cost)


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_counts_its_kind_and_is_the_sum_of_the_layers(vit_cost: ModelCost, seed: int):
    ranks = random_ranks(vit_cost, seed)
    for kind, total, fixed in (
        ("macs", vit_cost.macs(ranks), vit_cost.fixed_macs),
        ("params", vit_cost.params(ranks), vit_cost.fixed_params),
    ):
        budget = Budget.parse(f"{kind}=50%", vit_cost)
        assert budget.cost_of(vit_cost, ranks) == total
        assert fixed + sum(budget.layer_cost(layer, ranks[layer.name]) for layer in vit_cost.layers) == total


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_budget_is_reachable_from_the_smallest_subnet_on(vit_cost: ModelCost, kind: str):
    space = space_from_ratios(vit_cost, [0.25, 0.5])
    smallest = Budget.parse(f"{kind}=50%", vit_cost).cost_of(vit_cost, space.smallest())
    for limit in (smallest, vit_cost.dense_macs * 10):
        check_reachable(Budget.parse(f"{kind}={limit}", vit_cost), space, vit_cost)
    below = Budget.parse(f"{kind}={smallest - 1}", vit_cost)
    with pytest.raises(
        InputError, match=rf"{kind}={smallest - 1}.*{smallest:,} {WORDS[kind]} \(.*%\) to .*100.00%.*Raise"
    ):
        check_reachable(below, space, vit_cost)
