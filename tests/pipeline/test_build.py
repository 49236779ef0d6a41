"""A build writes a supernet folder that reloads to the same model; a choice of ranks makes it a compact model."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from flora.errors import InputError
from flora.lowrank.checkpoint import (
    DENSE_WEIGHTS,
    SUPERNET_CONFIG,
    SUPERNET_WEIGHTS,
    LoadedModel,
    LoadedSupernet,
    ModelConfig,
    content_digest,
    load_model_folder,
    load_supernet,
    save_model,
    sha256_of_file,
)
from flora.lowrank.supernet import active_ranks, elastic_layers
from flora.pipeline.build import build
from flora.pipeline.compact import chosen_ranks, compact_from_supernet
from flora.ranks.config import RankConfig
from flora.ranks.cost import ModelCost
from flora.ranks.uniform import uniform_ranks
from flora.resume import SETTINGS
from flora.training.data import TimmImages
from tests.samples import FAMILIES, GREY, random_images, random_ranks, tiny_args, tiny_model

VIT = FAMILIES["vit"][0]


def _loaded(family: str = "vit") -> LoadedModel:
    config = ModelConfig(
        model=FAMILIES[family][0], args=tiny_args(family), preprocessing=GREY, class_names=tuple("abcdefghij")
    )
    return LoadedModel(module=tiny_model(family), config=config)


@pytest.fixture(scope="module")
def built(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedSupernet:
    """The activation-aware supernet of the tiny ViT, as `build` returns it."""
    return build(_loaded(), tmp_path_factory.mktemp("build") / "supernet", data=str(image_folder))


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    return model(random_images(2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["svd", "activation"])
def test_a_supernet_reloads_to_the_same_outputs(family: str, method: str, image_folder: Path, tmp_path: Path):
    data = str(image_folder) if method == "activation" else None
    supernet = build(_loaded(family), tmp_path / "supernet", data=data, method=method)
    loaded = load_supernet(tmp_path / "supernet")
    assert loaded.config == supernet.config
    ranks = random_ranks(supernet.config.cost, 0)
    with active_ranks(supernet.module, ranks), active_ranks(loaded.module, ranks):
        assert torch.equal(_logits(loaded.module), _logits(supernet.module))


def test_a_supernet_is_loaded_at_full_rank_in_eval_mode(built: LoadedSupernet):
    loaded = load_supernet(built.folder).module
    assert all(layer.rank == layer.full_rank for layer in elastic_layers(loaded).values())
    assert not any(module.training for module in loaded.modules())
    assert torch.allclose(_logits(loaded), _logits(tiny_model()), atol=1e-4)


def test_a_supernet_brings_the_dense_model_that_it_came_from(built: LoadedSupernet):
    dense = load_supernet(built.folder).load_dense()
    assert torch.equal(_logits(dense.module), _logits(tiny_model()))
    assert dense.config.class_names == tuple("abcdefghij")


def test_a_supernet_folder_holds_no_pickle(built: LoadedSupernet):
    documents = {SUPERNET_CONFIG, SETTINGS}
    assert {path.name for path in built.folder.iterdir()} == {*documents, SUPERNET_WEIGHTS, DENSE_WEIGHTS}
    assert all(json.loads((built.folder / name).read_text())["schema_version"] == 1 for name in documents)


def test_the_recorded_cost_is_the_traced_one(built: LoadedSupernet, vit_cost: ModelCost):
    assert load_supernet(built.folder).config.cost == vit_cost


def test_the_images_used_are_recorded(built: LoadedSupernet, image_folder: Path):
    assert load_supernet(built.folder).config.image_sets["calibration"] == TimmImages(str(image_folder), GREY).record()


def test_the_spectrum_of_each_layer_is_recorded_in_descending_order(built: LoadedSupernet):
    for layer in built.config.layers.values():
        assert len(layer.spectrum) == 48
        assert list(layer.spectrum) == sorted(layer.spectrum, reverse=True)
        assert layer.spectrum[0] > 0


def test_the_space_holds_the_largest_subnet(built: LoadedSupernet, vit_cost: ModelCost):
    assert vit_cost.dense_ranks in built.config.space
    assert all(choices[0] == 48 // 8 for choices in built.config.space.choices.values())


def test_the_layers_that_are_named_are_factorized(tmp_path: Path):
    supernet = build(_loaded(), tmp_path / "supernet", layers=["proj"], method="svd")
    assert list(supernet.config.layers) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
    assert torch.allclose(_logits(load_supernet(supernet.folder).module), _logits(tiny_model()), atol=1e-4)


def test_activation_without_images_is_refused_and_writes_nothing(tmp_path: Path):
    with pytest.raises(InputError, match="calibration images"):
        build(_loaded(), tmp_path / "supernet")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_refused_before_the_work(tmp_path: Path, image_folder: Path):
    (tmp_path / "notes.txt").touch()
    reported: list[str] = []
    with pytest.raises(InputError, match=SUPERNET_CONFIG):
        build(_loaded(), tmp_path, data=str(image_folder), on_layer=reported.append)
    assert reported == []
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupted_build_leaves_the_previous_supernet(built: LoadedSupernet, image_folder: Path):
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    before = sha256_of_file(built.folder / SUPERNET_WEIGHTS)
    with pytest.raises(KeyboardInterrupt):
        build(_loaded(), built.folder, data=str(image_folder), restart=True, on_layer=interrupt)
    assert sha256_of_file(built.folder / SUPERNET_WEIGHTS) == before
    assert [path.name for path in built.folder.parent.iterdir()] == ["supernet"]


def _times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_build_of_the_same_model_and_settings_is_not_done_again(built: LoadedSupernet, image_folder: Path):
    before, started = _times(built.folder), []
    again = build(_loaded(), built.folder, data=str(image_folder), on_start=started.append)
    assert (started, _times(built.folder)) == ([True], before)
    assert again.config == built.config
    assert torch.equal(_logits(again.module), _logits(built.module))


def test_what_a_supernet_depends_on_makes_it_anew(image_folder: Path, tmp_path: Path):
    """Each change after the others; weights under the same name and pixels under the same path among them."""
    out, images = tmp_path / "supernet", shutil.copytree(image_folder, tmp_path / "images")
    started: list[bool] = []

    def started_anew(seed: int, **options) -> bool:
        model = dataclasses.replace(_loaded(), module=tiny_model(seed=seed))
        build(model, out, **({"data": str(images)} | options), on_start=started.append)
        return not started[-1]

    assert started_anew(0)
    assert not started_anew(0)
    assert started_anew(7)
    (images / "0" / "0.png").write_bytes((images / "1" / "1.png").read_bytes())
    assert started_anew(7)
    for options in ({"layers": ["proj"]}, {"space": "eighths"}, {"method": "svd", "data": None}, {"restart": True}):
        assert started_anew(7, **options), options


def test_the_content_of_a_supernet_is_the_same_whenever_and_from_wherever_it_was_made(tmp_path: Path):
    first, second, other = (
        build(model, tmp_path / name, method="svd", space=space)
        for name, model, space in (
            ("first", _loaded(), "eighths"),
            ("second", dataclasses.replace(_loaded(), folder=tmp_path), "eighths"),
            ("other", _loaded(), "sixths"),
        )
    )
    assert first.config != second.config
    assert content_digest(first.folder) == content_digest(second.folder) != content_digest(other.folder)


def test_the_content_of_a_supernet_does_not_depend_on_where_its_images_lie(image_folder: Path, tmp_path: Path):
    moved = shutil.copytree(image_folder, tmp_path / "moved")
    first, second, other = (
        build(_loaded(), tmp_path / name, data=data)
        for name, data in (("first", str(image_folder)), ("second", str(moved)), ("other", f"{moved},limit=19"))
    )
    assert first.config.image_sets != second.config.image_sets
    assert content_digest(first.folder) == content_digest(second.folder) != content_digest(other.folder)


def test_a_damaged_supernet_is_refused_by_its_file(tmp_path: Path):
    folder = build(_loaded(), tmp_path / "supernet", method="svd").folder
    weights = folder / SUPERNET_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=rf"{SUPERNET_WEIGHTS} is damaged"):
        load_supernet(folder)


def test_a_folder_that_is_no_supernet_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"holds no supernet\.json.*flora build"):
        load_supernet(tmp_path)


@pytest.mark.parametrize("ways", [{}, {"ratio": 0.5, "macs": "50%"}])
def test_ranks_are_given_in_exactly_one_way(built: LoadedSupernet, ways: dict):
    with pytest.raises(InputError, match="one way"):
        chosen_ranks(built, **ways)


def test_ranks_of_a_ratio_come_with_their_cost(built: LoadedSupernet, vit_cost: ModelCost):
    config = chosen_ranks(built, ratio=0.25)
    ranks = uniform_ranks(vit_cost, 0.25)
    assert (config.model, config.ranks) == (VIT, ranks)
    assert (config.macs, config.params) == (vit_cost.macs(ranks), vit_cost.params(ranks))


def test_ranks_of_a_budget_meet_it(built: LoadedSupernet, vit_cost: ModelCost):
    config = chosen_ranks(built, macs="60%")
    assert vit_cost.macs(config.ranks) == config.macs <= 0.6 * vit_cost.dense_macs
    assert config.budget == "macs=60%"


def test_ranks_of_a_file_are_checked_and_kept(built: LoadedSupernet, vit_cost: ModelCost, tmp_path: Path):
    config = RankConfig(model=VIT, ranks=random_ranks(vit_cost, 3), score=0.9)
    config.save(tmp_path / "ranks.json")
    assert chosen_ranks(built, file=tmp_path / "ranks.json").ranks == config.ranks
    RankConfig(model="deit", ranks=config.ranks).save(tmp_path / "ranks.json")
    with pytest.raises(InputError, match="deit"):
        chosen_ranks(built, file=tmp_path / "ranks.json")


@pytest.mark.parametrize("seed", range(2))
def test_a_compact_model_equals_the_supernet_and_reloads(built: LoadedSupernet, tmp_path: Path, seed: int):
    config = RankConfig(model=VIT, ranks=random_ranks(built.config.cost, seed))
    compact = compact_from_supernet(built, config)
    with active_ranks(built.module, config.ranks):
        expected = _logits(built.module)
    assert (_logits(compact.module) - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    save_model(tmp_path / "compact", compact.module, compact.config)
    loaded = load_model_folder(tmp_path / "compact")
    assert torch.equal(_logits(loaded.module), _logits(compact.module))
    assert loaded.config == compact.config


def test_a_compact_model_records_what_it_is_verified_against(built: LoadedSupernet):
    compact = compact_from_supernet(built, chosen_ranks(built, ratio=0.5))
    assert Path(compact.config.reference.path) == built.folder / DENSE_WEIGHTS
    assert compact.config.reference.sha256 == sha256_of_file(built.folder / DENSE_WEIGHTS)
    assert compact.config.image_sets == built.config.image_sets
