"""A search space knows its size, survives JSON, holds its own configs only, and groups layers into blocks."""

import itertools

import pytest
from pydantic import ValidationError

from flora.errors import InputError
from flora.ranks.cost import ModelCost
from flora.ranks.space import (
    DEFAULT_SPACE,
    SearchSpace,
    blocks_of,
    space_from_multiples,
    space_from_ratios,
    space_from_text,
)
from tests.samples import cost_of

SPACE = SearchSpace(choices={"a": (2, 4, "dense"), "b": (3,), "c": (1, "dense")}, blocks=(("a", "b"), ("c",)))


def test_size_is_the_number_of_configs():
    configs = [dict(zip("abc", ranks, strict=True)) for ranks in itertools.product(*SPACE.choices.values())]
    assert SPACE.size == len(configs) == 6
    assert all(config in SPACE for config in configs)


def test_size_of_the_papers_space_is_exact():
    cost = cost_of(*[(768, 2304, 197), (768, 3072, 197), (3072, 768, 197)] * 12)
    assert space_from_ratios(cost, [n / 8 for n in (1, 2, 3, 4, 5, 8)]).size == (6**3) ** 12


def test_a_space_survives_json():
    assert SearchSpace.model_validate_json(SPACE.model_dump_json()) == SPACE


def test_smallest_and_largest_lie_in_the_space():
    assert SPACE.smallest() == {"a": 2, "b": 3, "c": 1}
    assert SPACE.largest() == {"a": "dense", "b": 3, "c": "dense"}
    assert SPACE.smallest() in SPACE
    assert SPACE.largest() in SPACE


@pytest.mark.parametrize(
    "ranks",
    [{"a": 2, "b": 3}, {"a": 3, "b": 3, "c": 1}, {"a": 2, "b": 3, "c": 1, "d": 1}, {"a": 2, "b": "dense", "c": 1}],
)
def test_other_configs_do_not_lie_in_the_space(ranks: dict):
    assert ranks not in SPACE


@pytest.mark.parametrize("choices", [(4, 2), (2, 2), ("dense", 2), (), (0, 2), (-1,), ("dense", "dense")])
def test_choices_out_of_order_are_refused_by_layer(choices: tuple):
    with pytest.raises(ValidationError, match="fc1"):
        SearchSpace(choices={"fc1": choices}, blocks=(("fc1",),))


@pytest.mark.parametrize("blocks", [(), (("a",),), (("a", "b"), ("b",)), (("a", "b", "c"),)])
def test_blocks_must_hold_every_layer_once(blocks: tuple):
    with pytest.raises(ValidationError, match="exactly once"):
        SearchSpace(choices={"a": (1,), "b": (1,)}, blocks=blocks)


def test_multiples_stay_below_break_even_and_end_dense(vit_cost: ModelCost):
    space = space_from_multiples(vit_cost, 8)
    assert space.choices["blocks.0.attn.qkv"] == (8, 16, 24, 32, "dense")  # break-even 36
    assert space.choices["blocks.0.mlp.fc2"] == (8, 16, 24, 32, "dense")  # break-even 39


def test_a_layer_too_small_for_the_grid_stays_dense():
    assert space_from_multiples(cost_of((8, 8, 1)), 8).choices == {"blocks.0.l0": ("dense",)}


def test_ratios_are_shares_of_the_full_rank(vit_cost: ModelCost):
    assert space_from_ratios(vit_cost, [0.5, 0.25, 1]).choices["blocks.0.attn.qkv"] == (12, 24, "dense")


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5, float("nan")])
def test_a_ratio_out_of_range_is_refused(vit_cost: ModelCost, ratio: float):
    with pytest.raises(InputError, match=str(ratio)):
        space_from_ratios(vit_cost, [0.5, ratio])


@pytest.mark.parametrize("multiple", [0, -8])
def test_a_grid_that_is_not_positive_is_refused(vit_cost: ModelCost, multiple: int):
    with pytest.raises(InputError, match=str(multiple)):
        space_from_multiples(vit_cost, multiple)


DEIT = [384, 768]


def deit_block(width: int) -> ModelCost:
    """One block of DeiT-S or DeiT-B: qkv, fc1 and fc2."""
    return cost_of((width, 3 * width, 197), (width, 4 * width, 197), (4 * width, width, 197))


@pytest.mark.parametrize("width", DEIT)
def test_the_default_space_of_a_real_model_can_be_listed_and_so_filtered(width: int):
    space = space_from_text(DEFAULT_SPACE, deit_block(width))
    assert len(space.block_candidates(0)) == space.size == 6 * 7 * 7


@pytest.mark.parametrize("width", DEIT)
def test_a_block_of_too_many_candidates_is_refused_with_the_grids_to_build_again_with(width: int):
    space = space_from_text("multiples=8", deit_block(width))
    with pytest.raises(InputError, match=rf"{space.size:,} candidates.* build again .*--space: eighths, sixths"):
        space.block_candidates(0)


def test_blocks_of_a_vit():
    names = ["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv", "blocks.10.attn.qkv"]
    assert blocks_of(names) == (tuple(names[:2]), (names[2],), (names[3],))


def test_blocks_of_a_swin_are_not_its_stages():
    names = ["layers.0.blocks.0.mlp.fc1", "layers.0.blocks.1.mlp.fc1", "layers.1.blocks.0.mlp.fc1"]
    assert blocks_of(names) == tuple((name,) for name in names)


def test_a_layer_outside_any_block_is_one_of_its_own():
    assert blocks_of(["head", "blocks.0.mlp.fc1"]) == (("head",), ("blocks.0.mlp.fc1",))
