"""The figures of the paper's two released subnets, counted and by the paper's formula (method.md, section 3.2)."""

import pytest
import timm

from flora.lowrank.targets import find_targets, trace_cost
from flora.ranks.cost import ModelCost, Rank
from flora.ranks.paper import DEIT_B_8G, DEIT_S_2G7, paper_flops
from flora.ranks.space import GRIDS, space_from_ratios

BASE, SMALL = "deit_base_patch16_224", "deit_small_patch16_224"
DIMS = {BASE: 768, SMALL: 384}
RELEASED = {BASE: DEIT_B_8G, SMALL: DEIT_S_2G7}
DENSE = {name: [(dim, dim, dim)] * 12 for name, dim in DIMS.items()}
TOKENS, BLOCKS = 197, 12


@pytest.fixture(scope="session")
def deit_costs() -> dict[str, ModelCost]:
    """The traced costs of the full DeiT-B and DeiT-S."""

    def traced(name: str) -> ModelCost:
        model = timm.create_model(name)
        return trace_cost(model, find_targets(model), (3, 224, 224))

    return {name: traced(name) for name in DIMS}


def _ranks(cost: ModelCost, dim: int, blocks) -> dict[str, Rank]:
    flat = [rank for block in blocks for rank in block]
    return {layer.name: "dense" if rank == dim else rank for layer, rank in zip(cost.layers, flat, strict=True)}


def test_targets_come_in_the_papers_order(deit_costs: dict[str, ModelCost]):
    for cost in deit_costs.values():
        assert [name.rsplit(".", 1)[-1] for name in cost.shapes] == ["qkv", "fc1", "fc2"] * BLOCKS


@pytest.mark.parametrize(
    ("name", "macs", "params"), [(BASE, 8_035_811_328, 38_202_088), (SMALL, 2_730_074_112, 12_564_328)]
)
def test_released_subnets_have_their_counted_cost(deit_costs, name: str, macs: int, params: int):
    cost = deit_costs[name]
    ranks = _ranks(cost, DIMS[name], RELEASED[name])
    assert (cost.macs(ranks), cost.params(ranks)) == (macs, params)


@pytest.mark.parametrize(
    ("name", "macs", "params"), [(BASE, 17_563_828_224, 86_567_656), (SMALL, 4_598_882_304, 22_050_664)]
)
def test_dense_models_have_their_counted_cost(deit_costs, name: str, macs: int, params: int):
    assert (deit_costs[name].dense_macs, deit_costs[name].dense_params) == (macs, params)


@pytest.mark.parametrize(
    ("name", "blocks", "flops"),
    [
        (BASE, RELEASED[BASE], 8_039_443_200),
        (SMALL, RELEASED[SMALL], 2_731_890_048),
        (BASE, DENSE[BASE], 17_567_460_096),
        (SMALL, DENSE[SMALL], 4_600_698_240),
    ],
)
def test_the_papers_formula_gives_the_papers_figures(name: str, blocks, flops: int):
    assert paper_flops(DIMS[name], blocks) == flops


@pytest.mark.parametrize("name", DIMS)
@pytest.mark.parametrize("blocks", [RELEASED, DENSE], ids=["released", "dense"])
def test_the_papers_flops_are_the_counted_macs_and_one_for_each_normalized_element(deit_costs, name: str, blocks):
    cost, dim = deit_costs[name], DIMS[name]
    counted = cost.macs(_ranks(cost, dim, blocks[name]))
    assert paper_flops(dim, blocks[name]) - counted == 2 * BLOCKS * TOKENS * dim + dim


@pytest.mark.parametrize(("name", "ratios"), [(BASE, GRIDS["eighths"]), (SMALL, GRIDS["sixths"])])
def test_the_papers_grid_holds_the_released_subnet_up_to_break_even(deit_costs, name: str, ratios):
    cost = deit_costs[name]
    space = space_from_ratios(cost, ratios)
    released = _ranks(cost, DIMS[name], RELEASED[name])
    merged = {layer: rank if cost.shapes[layer].is_factored(rank) else "dense" for layer, rank in released.items()}
    assert merged in space
