"""The additive model: what was probed is what it says there, more rank is never worse, and a sum is a sum."""

import pytest

from flora.ranks.allocate import allocate
from flora.ranks.budget import Budget
from flora.ranks.sensitivity import PROBE_SHARE, AdditiveModel, LayerSensitivity, probe_rank
from flora.ranks.space import space_from_text
from tests.samples import cost_of

COST = cost_of((64, 192, 10), (64, 64, 10), (64, 256, 10))
SPECTRUM = [2.0**-i for i in range(64)]


def model(**divergences: float) -> AdditiveModel:
    """All layers have the same spectrum; `l0` to `l2` are what was measured at their probes, by default nothing."""
    probes = {
        layer.name: LayerSensitivity(rank=probe_rank(layer), divergence=divergences.get(layer.name.split(".")[2], 0.0))
        for layer in COST.layers
    }
    return AdditiveModel(dict.fromkeys(COST.shapes, SPECTRUM), probes)


def test_at_the_probed_rank_the_error_is_what_was_measured():
    assert probe_rank(COST.layers[0]) == 64 * PROBE_SHARE == 8
    assert model(l0=0.3).layer_error("blocks.0.l0", 8) == pytest.approx(0.3)


def test_elsewhere_it_goes_with_the_discarded_energy():
    """Energies halve from one component to the next, and so does what lies behind a rank, up to the end."""
    found = [model(l0=0.3).layer_error("blocks.0.l0", rank) for rank in (6, 7, 8, 9)]
    assert found == pytest.approx([1.2, 0.6, 0.3, 0.15], rel=1e-6)


def test_a_dense_layer_and_one_that_discards_nothing_add_nothing():
    assert model(l0=0.3).layer_error("blocks.0.l0", "dense") == 0
    assert model(l0=0.3).layer_error("blocks.0.l0", 64) == 0
    flat = AdditiveModel(
        {"blocks.0.l0": [1.0] * 8 + [0.0] * 56}, {"blocks.0.l0": LayerSensitivity(rank=8, divergence=0.1)}
    )
    assert flat.layer_error("blocks.0.l0", 4) == 0


def test_the_error_of_the_model_is_the_sum_over_its_layers():
    ranks = {"blocks.0.l0": 4, "blocks.0.l1": 12, "blocks.0.l2": "dense"}
    one = model(l0=0.3, l1=0.1, l2=5.0)
    assert one.error(ranks) == pytest.approx(sum(one.layer_error(name, rank) for name, rank in ranks.items()))
    assert one.error(COST.dense_ranks) == 0


def test_choices_are_those_of_the_space_with_their_cost_and_error():
    space, budget = space_from_text("multiples=16", COST), Budget.parse("params=50%", COST)
    one = model(l0=0.3)
    choices = one.choices(space, COST, budget)
    assert [[choice.ranks for choice in part] for part in choices] == [
        [{name: rank} for rank in ranks] for name, ranks in space.choices.items()
    ]
    for part in choices:
        for choice in part:
            ((name, rank),) = choice.ranks.items()
            assert choice.cost == budget.layer_cost(COST.shapes[name], rank)
            assert choice.error == one.layer_error(name, rank)


def test_the_layer_that_the_model_minds_gets_the_rank():
    space, budget = space_from_text("multiples=4", COST), Budget.parse("macs=50%", COST)

    def ranks(**divergences: float):
        return allocate(model(**divergences).choices(space, COST, budget), budget.left_for_layers(COST))

    first, last = ranks(l0=1.0, l1=0.01, l2=1e-9), ranks(l0=1e-9, l1=0.01, l2=1.0)
    order = [*range(0, 64, 4), "dense"]
    assert order.index(first["blocks.0.l0"]) > order.index(last["blocks.0.l0"])
    assert order.index(first["blocks.0.l2"]) < order.index(last["blocks.0.l2"])
    assert all(budget.cost_of(COST, found) <= budget.limit for found in (first, last))
