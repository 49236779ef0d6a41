"""A rank config survives its file, and one that does not fit its model is refused by name."""

import json
from pathlib import Path

import pytest

from flora.errors import InputError
from flora.ranks.config import RankConfig
from flora.ranks.cost import ModelCost
from tests.samples import random_ranks

LAYER = "blocks.1.mlp.fc1"


def _check(cost: ModelCost, ranks: dict, model: str = "vit") -> None:
    RankConfig(model="vit", ranks=ranks).check(model=model, shapes=cost.shapes)


def test_a_config_survives_its_file(vit_cost: ModelCost, tmp_path: Path):
    ranks = random_ranks(vit_cost, 0)
    config = RankConfig(model="vit", ranks=ranks, budget="macs=50%", macs=7, params=3, score=0.5, origin="by hand")
    config.save(tmp_path / "ranks.json")
    assert RankConfig.load(tmp_path / "ranks.json") == config
    assert list(RankConfig.load(tmp_path / "ranks.json").ranks) == list(ranks)


@pytest.mark.parametrize("seed", range(5))
def test_any_legal_config_is_accepted(vit_cost: ModelCost, seed: int):
    _check(vit_cost, random_ranks(vit_cost, seed))


def test_an_unknown_key_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "ranks.json"
    path.write_text(json.dumps({"model": "vit", "ranks": {}, "bugdet": "50%"}))
    with pytest.raises(InputError, match=r"ranks\.json.*bugdet"):
        RankConfig.load(path)


def test_a_missing_layer_is_named(vit_cost: ModelCost):
    ranks = {name: rank for name, rank in vit_cost.dense_ranks.items() if name != LAYER}
    with pytest.raises(InputError, match=LAYER):
        _check(vit_cost, ranks)


def test_an_unexpected_layer_is_named(vit_cost: ModelCost):
    with pytest.raises(InputError, match=r"blocks\.9\.mlp\.fc1"):
        _check(vit_cost, {**vit_cost.dense_ranks, "blocks.9.mlp.fc1": 4})


@pytest.mark.parametrize("rank", [-1, 0, 48, 49])
def test_a_rank_out_of_range_is_refused_with_the_range(vit_cost: ModelCost, rank: int):
    with pytest.raises(InputError, match=rf"{LAYER} has rank {rank}, allowed are 1 to 47"):
        _check(vit_cost, {**vit_cost.dense_ranks, LAYER: rank})


@pytest.mark.parametrize("layer", [LAYER, "blocks.7.mlp.fc1"])
def test_only_a_layer_with_a_rank_can_be_pivoted(vit_cost: ModelCost, layer: str):
    config = RankConfig(model="vit", ranks=vit_cost.dense_ranks, pivoted=(layer,))
    with pytest.raises(InputError, match=f"pivoted without an integer rank: {layer}"):
        config.check(model="vit", shapes=vit_cost.shapes)


def test_a_config_of_another_model_is_refused_with_both_names(vit_cost: ModelCost):
    with pytest.raises(InputError, match=r"for vit, the model is deit"):
        _check(vit_cost, dict(vit_cost.dense_ranks), model="deit")


@pytest.mark.parametrize("rank", ["2.0", "2.5", "true", "null", '"full"', '"8"'])
def test_what_is_neither_a_whole_number_nor_dense_is_refused_by_name(rank: str):
    with pytest.raises(InputError, match=LAYER):
        RankConfig.parse(f'{{"model": "vit", "ranks": {{"{LAYER}": {rank}}}}}', origin="ranks.json")
