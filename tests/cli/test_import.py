"""`flora import`: what the authors released becomes folders that the other commands take."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flora.lowrank.checkpoint import load_model_folder, load_supernet
from flora.lowrank.supernet import active_ranks
from flora.lowrank.targets import find_targets, trace_cost
from flora.ranks.config import RankConfig
from flora.ranks.paper import DEIT_S_2G7
from tests.flora_command import Outcome, assert_nothing_at, assert_refused, flora
from tests.lowrank.test_released import released_space, released_yaml, subnet_state, supernet_state, written
from tests.samples import FAMILIES, IMAGE, random_images, random_ranks, tiny_args, tiny_model

SMALL = "deit_small_patch16_224"
RATIOS = [[(0.25, 0.5, 0.5), (0.5, 0.25, 0.25)], [(0.25, 0.25, 0.25), (1.0, 1.0, 1.0)]]


def named(family: str) -> list[str]:
    """The options that name a tiny model of a family."""
    pairs = [f"{key}={value}" for key, value in tiny_args(family).items()]
    return ["--model", FAMILIES[family][0], *(part for pair in pairs for part in ("-K", pair))]


def imported(file: Path, out: Path, *args: object) -> Outcome:
    outcome = flora("import", file, *args, "-o", out)
    assert outcome.code == 0, outcome
    return outcome


@torch.no_grad()
def logits(module: torch.nn.Module) -> torch.Tensor:
    return module(random_images(3, seed=5))


@pytest.fixture(scope="module", params=["deit", "swin"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released supernet of the tiny model."""
    return written(tmp_path_factory.mktemp("released") / "supernet.pth", supernet_state(tiny_model(family)), epoch=1)


@pytest.fixture(scope="module")
def supernet(checkpoint: Path, family: str) -> Path:
    """The same, imported."""
    imported(checkpoint, checkpoint.parent / "net", *named(family))
    return checkpoint.parent / "net"


@pytest.fixture(scope="module")
def deit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a released supernet and subnet of the tiny DeiT, its ranks, and the imported supernet."""
    folder = tmp_path_factory.mktemp("deit")
    model = tiny_model("deit")
    state = supernet_state(model)
    blocks = [[12, 24, 12], [48, 40, 6]]
    flat = [rank if rank < 48 else "dense" for block in blocks for rank in block]
    written(folder / "supernet.pth", state)
    written(folder / "subnet.pth", subnet_state(state, dict(zip(find_targets(model), flat, strict=True))))
    released_yaml(folder / "subnet.yml", 48, blocks)
    imported(folder / "supernet.pth", folder / "net", *named("deit"))
    return folder


def test_a_supernet_becomes_a_folder_that_loads(supernet: Path, family: str):
    loaded = load_supernet(supernet)
    dense = tiny_model(family)
    assert loaded.config.method == "released"
    assert loaded.config.image_sets == {}
    assert (logits(loaded.module) - logits(dense)).abs().max() < 1e-5
    assert (logits(loaded.load_dense().module) - logits(dense)).abs().max() < 1e-5
    for record in loaded.config.layers.values():
        assert len(record.spectrum) == min(record.in_features, record.out_features)
        assert list(record.spectrum) == sorted(record.spectrum, reverse=True)


def test_an_imported_supernet_counts_as_the_dense_model_does(supernet: Path, family: str):
    dense = tiny_model(family)
    assert load_supernet(supernet).config.cost == trace_cost(dense, find_targets(dense), IMAGE)


def test_the_space_is_the_papers_grid(supernet: Path):
    config = load_supernet(supernet).config
    for name, choices in config.space.choices.items():
        layer = config.cost.shapes[name]
        sixths = [round(n * layer.full_rank / 6) for n in range(1, 6)]
        assert choices == (*[rank for rank in sixths if layer.is_factored(rank)], "dense")


def test_an_imported_supernet_is_materialized_by_the_next_command(supernet: Path, tmp_path: Path):
    assert flora("materialize", supernet, "--uniform", 0.5, "-o", tmp_path / "compact").code == 0
    compact = load_model_folder(tmp_path / "compact")
    loaded = load_supernet(supernet)
    with active_ranks(loaded.module, compact.config.ranks):
        assert torch.allclose(logits(loaded.module), logits(compact.module), atol=1e-5)


def test_a_subnet_becomes_a_compact_model_that_equals_the_supernet(
    checkpoint: Path, supernet: Path, family: str, tmp_path: Path
):
    loaded = load_supernet(supernet)
    ranks = random_ranks(loaded.config.cost, 3)
    state = torch.load(checkpoint, weights_only=True)["model"]
    imported(written(tmp_path / "subnet.pth", subnet_state(state, ranks)), tmp_path / "compact", *named(family))
    compact = load_model_folder(tmp_path / "compact")
    assert compact.config.ranks == ranks
    with active_ranks(loaded.module, ranks):
        assert (logits(compact.module) - logits(loaded.module)).abs().max() < 1e-5
    config = RankConfig.load(tmp_path / "compact" / "ranks.json")
    assert (config.ranks, config.macs) == (ranks, loaded.config.cost.macs(ranks))
    assert config.params == sum(parameter.numel() for parameter in compact.module.parameters())


def test_dense_weights_are_kept_as_the_reference(checkpoint: Path, family: str, tmp_path: Path):
    trained = tiny_model(family, seed=4)
    weights = written(tmp_path / "dense.pth", trained.state_dict())
    outcome = imported(checkpoint, tmp_path / "net", *named(family), "--dense", weights)
    assert "multiplied out" not in outcome.out
    stored = load_file(tmp_path / "net" / "dense.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in trained.state_dict().items())


def test_without_dense_weights_it_is_said_what_takes_their_place(deit: Path, tmp_path: Path):
    outcome = imported(deit / "supernet.pth", tmp_path / "net", *named("deit"))
    assert "multiplied out at full rank" in outcome.out
    assert f"flora materialize {tmp_path / 'net'}" in outcome.out
    said = json.loads(imported(deit / "supernet.pth", tmp_path / "net", *named("deit"), "--json").out)
    assert said["dense_weights"] == "multiplied out at full rank"
    assert said["layers"] == 6


def test_a_subnet_is_held_against_its_yaml_and_its_dense_model(deit: Path, tmp_path: Path):
    dense = written(tmp_path / "dense.pth", tiny_model("deit").state_dict())
    args = [*named("deit"), "--svd-config", deit / "subnet.yml", "--dense", dense, "--json"]
    said = json.loads(imported(deit / "subnet.pth", tmp_path / "compact", *args).out)
    assert (said["cut_layers"], said["dense_layers"]) == (5, 1)
    config = load_model_folder(tmp_path / "compact").config
    assert config.reference is not None
    assert Path(config.reference.path) == dense.absolute()
    released_yaml(tmp_path / "other.yml", 48, [[12, 24, 12], [48, 40, 12]])
    args = [*named("deit"), "--svd-config", tmp_path / "other.yml"]
    outcome = flora("import", deit / "subnet.pth", *args, "-o", tmp_path / "out")
    assert_refused(outcome, "not the subnet", "blocks.1.mlp.fc2 6, not 12")
    assert_nothing_at(tmp_path / "out")


def test_a_yaml_becomes_ranks_that_materialize_takes(deit: Path, tmp_path: Path):
    imported(deit / "subnet.yml", tmp_path / "ranks.json", *named("deit"))
    assert flora("materialize", deit / "net", "--ranks", tmp_path / "ranks.json", "-o", tmp_path / "compact").code == 0
    imported(deit / "subnet.pth", tmp_path / "same", *named("deit"))
    one, other = load_model_folder(tmp_path / "compact"), load_model_folder(tmp_path / "same")
    assert one.config.ranks == other.config.ranks
    assert (logits(one.module) - logits(other.module)).abs().max() < 1e-5


def test_the_released_yaml_of_deit_s_has_the_counted_cost(tmp_path: Path):
    released_yaml(tmp_path / "subnet.yml", 384, DEIT_S_2G7)
    said = json.loads(imported(tmp_path / "subnet.yml", tmp_path / "r.json", "--model", SMALL, "--json").out)
    assert (said["macs"], said["params"]) == (2_730_074_112, 12_564_328)


def test_a_pickled_space_goes_into_a_new_supernet(deit: Path, tmp_path: Path):
    (tmp_path / "space.pickle").write_bytes(pickle.dumps(released_space(RATIOS)))
    said = json.loads(
        imported(tmp_path / "space.pickle", tmp_path / "filtered", "--supernet", deit / "net", "--json").out
    )
    assert said["block_candidates"] == [4, 2]
    before, after = load_supernet(deit / "net"), load_supernet(tmp_path / "filtered")
    assert after.config == before.config.model_copy(update={"space": after.config.space})
    assert after.config.space.size == 8
    assert torch.equal(logits(after.module), logits(before.module))
    for name in ("supernet.safetensors", "dense.safetensors"):
        assert (tmp_path / "filtered" / name).read_bytes() == (deit / "net" / name).read_bytes()


def test_a_pickle_that_runs_code_is_refused(deit: Path, tmp_path: Path):
    class Call:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "space.pkl").write_bytes(pickle.dumps([[Call()]]))
    outcome = flora("import", tmp_path / "space.pkl", "--supernet", deit / "net", "-o", tmp_path / "out")
    assert_refused(outcome, "posix.mkdir", "nothing was run")
    assert not (tmp_path / "made").exists()
    assert_nothing_at(tmp_path / "out")


def test_a_checkpoint_is_one_whatever_its_name(deit: Path, tmp_path: Path):
    (tmp_path / "supernet.pkl").write_bytes((deit / "supernet.pth").read_bytes())
    imported(tmp_path / "supernet.pkl", tmp_path / "net", *named("deit"))
    assert load_supernet(tmp_path / "net").config.method == "released"


REFUSED = {
    "another model": (["supernet.pth", *named("vit"), "-K", "depth=1"], "unexpected: blocks.1."),
    "an unknown model": (["supernet.pth", "--model", "deit_smal_patch16_224"], "Did you mean"),
    "no checkpoint": (["none.pth", *named("deit")], "none.pth does not exist"),
    "no yaml": (["none.yml", *named("deit")], "none.yml does not exist"),
    "no pickle": (["none.pickle", "--supernet", "net"], "none.pickle does not exist"),
    "no supernet": (["none.pickle", "--supernet", "nowhere"], "nowhere is no supernet folder"),
    "a supernet with a yaml": (["supernet.pth", *named("deit"), "--svd-config", "subnet.yml"], "holds every rank"),
    "no dense weights": (["supernet.pth", *named("deit"), "--dense", "none.pth"], "none.pth does not exist"),
    "no dense weights of a subnet": (["subnet.pth", *named("deit"), "--dense", "none.pth"], "no weights file"),
    "dense weights of another": (["subnet.pth", *named("deit"), "--dense", "supernet.pth"], "does not fit the model"),
    "a yaml for another depth": (["subnet.yml", *named("deit"), "-K", "depth=3"], "another depth"),
    "a yaml for another width": (["subnet.yml", *named("deit"), "-K", "embed_dim=96"], "width 48"),
    "a yaml for another family": (["subnet.yml", *named("swin")], "MODEL.SWIN.SVD_CONFIG"),
}


@pytest.mark.parametrize(("args", "says"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(deit: Path, tmp_path: Path, monkeypatch, args, says: str):
    monkeypatch.chdir(deit)
    assert_refused(flora("import", *args, "-o", tmp_path / "out"), says)
    assert_nothing_at(tmp_path / "out")


def test_a_truncated_checkpoint_is_refused(deit: Path, tmp_path: Path):
    content = (deit / "supernet.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    assert_refused(flora("import", tmp_path / "cut.pth", *named("deit"), "-o", tmp_path / "out"), "cut.pth")
    assert_nothing_at(tmp_path / "out")


def test_a_folder_of_another_kind_is_not_replaced(deit: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (tmp_path / "space.pickle").write_bytes(pickle.dumps(released_space(RATIOS)))
    for args in (
        [deit / "supernet.pth", *named("deit")],
        [deit / "subnet.pth", *named("deit")],
        [tmp_path / "space.pickle", "--supernet", deit / "net"],
    ):
        assert_refused(flora("import", *args, "-o", tmp_path / "out"), "not replaced")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


USAGE = {
    "no output": (["file.pth", "--model", "m"], "--out"),
    "a checkpoint without a model": (["file.pth", "-o", "out"], "give --model NAME"),
    "a checkpoint with a supernet": (["file.pth", "--model", "m", "--supernet", "s", "-o", "out"], "leave --supernet"),
    "a yaml without a model": (["file.yaml", "-o", "out"], "give --model NAME"),
    "a yaml with weights": (["file.yml", "--model", "m", "--dense", "d", "-o", "out"], "leave --dense out"),
    "a space without a supernet": (["file.pkl", "-o", "out"], "give --supernet DIR"),
    "a space with a model": (["file.pickle", "--supernet", "s", "--model", "m", "-o", "out"], "leave --model out"),
    "a space in place": (["file.pickle", "--supernet", "s", "-o", "./s"], "never changed in place"),
    "half an argument": (["file.pth", "--model", "m", "-K", "depth", "-o", "out"], "KEY=VALUE"),
}


@pytest.mark.parametrize(("args", "says"), USAGE.values(), ids=USAGE)
def test_options_that_do_not_belong_are_usage_errors(args, says: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = flora("import", *args)
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.message
    assert list(tmp_path.iterdir()) == []


def test_deit_base_gets_eighths(tmp_path: Path):
    """The whole width of DeiT-B in one block: the grid follows the width."""
    import timm

    args = {"depth": 1, "num_classes": 2}
    model = timm.create_model("deit_base_patch16_224", **args).eval()
    path = written(tmp_path / "base.pth", supernet_state(model))
    imported(path, tmp_path / "net", "--model", "deit_base_patch16_224", "-K", "depth=1", "-K", "num_classes=2")
    choices = load_supernet(tmp_path / "net").config.space.choices
    assert choices["blocks.0.attn.qkv"] == (96, 192, 288, 384, 480, "dense")
    assert choices["blocks.0.mlp.fc2"] == (96, 192, 288, 384, 480, 576, "dense")
    assert np.isclose(
        load_supernet(tmp_path / "net").config.cost.dense_params, sum(p.numel() for p in model.parameters())
    )
