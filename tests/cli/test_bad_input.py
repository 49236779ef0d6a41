"""Bad input ends in one line that says what is wrong, exit code 1, and nothing under the output's name."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flora.cli.options import _of_this_process
from tests.flora_command import assert_nothing_at, assert_refused, flora, leftovers
from tests.worked_example import MODEL, WorkedExample

SMALL = ["-K", "embed_dim=48", "-K", "num_heads=3", "-K", "depth=1"]


def build(model: object, out: Path, *more: object):
    return flora("build", model, "--method", "svd", "-o", out, *more)


def truncated(folder: Path, copy: Path, name: str) -> Path:
    """A copy of `folder` in which half of the file `name` is missing."""
    shutil.copytree(folder, copy)
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    return copy


# Models and checkpoints


def test_an_unknown_model_is_refused_with_near_matches(tmp_path):
    out = tmp_path / "out"
    assert_refused(build("vit_tiny_patch16_225", out, "--pretrained"), "vit_tiny_patch16_224")
    assert_refused(build("vit_tiny_patch16_225", out), "vit_tiny_patch16_224")
    assert_nothing_at(out)


def test_random_weights_are_refused(tmp_path):
    assert_refused(build(MODEL, tmp_path / "out"), "random weights", "--checkpoint FILE or --pretrained")
    assert_nothing_at(tmp_path / "out")


def test_a_missing_model_folder_is_named(tmp_path):
    assert_refused(build(tmp_path / "none", tmp_path / "out"), str(tmp_path / "none"))
    assert_nothing_at(tmp_path / "out")


def test_a_checkpoint_for_another_model_is_refused_with_its_keys(worked, tmp_path):
    save_file({"layer1.conv.weight": torch.zeros(2)}, tmp_path / "resnet.safetensors")
    outcome = build(MODEL, tmp_path / "out", "--checkpoint", tmp_path / "resnet.safetensors", *SMALL)
    assert_refused(outcome, "missing: cls_token", "unexpected: layer1.conv.weight", "--model-kwargs")
    fewer = build(MODEL, tmp_path / "out", "--checkpoint", worked.dense / "model.safetensors", *SMALL)
    assert_refused(fewer, "unexpected: blocks.1.")
    assert_nothing_at(tmp_path / "out")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"state_dict": {"head.weight": torch.nn.Linear(1, 1)}}, tmp_path / "model.pth")
    outcome = build(MODEL, tmp_path / "out", "--checkpoint", tmp_path / "model.pth", *SMALL)
    assert_refused(outcome, "model.pth", "plain weights")
    assert_nothing_at(tmp_path / "out")


def test_a_checkpoint_that_is_missing_or_none_is_refused(tmp_path):
    assert_refused(build(MODEL, tmp_path / "out", "--checkpoint", tmp_path / "no.pth"), "no.pth does not exist")
    for name in ("text.safetensors", "text.pth"):
        (tmp_path / name).write_text("no weights at all")
        assert_refused(build(MODEL, tmp_path / "out", "--checkpoint", tmp_path / name, *SMALL), name)
    assert_nothing_at(tmp_path / "out")


@pytest.mark.parametrize("argument", ["depht=1", "depth=two"])
def test_an_argument_that_timm_does_not_take_is_refused(tmp_path, worked, argument):
    outcome = build(MODEL, tmp_path / "out", "--checkpoint", worked.dense / "model.safetensors", "-K", argument)
    assert_refused(outcome, MODEL, argument.partition("=")[0])
    assert_nothing_at(tmp_path / "out")


def test_a_model_folder_takes_no_other_weights(worked, tmp_path):
    outcome = build(worked.dense, tmp_path / "out", "--checkpoint", worked.dense / "model.safetensors")
    assert_refused(outcome, "brings its own arguments and weights")
    assert_nothing_at(tmp_path / "out")


def test_a_supernet_folder_takes_no_other_weights(worked):
    more = ("--checkpoint", worked.dense / "model.safetensors")
    assert_refused(flora("eval", worked.supernet, "--data", worked.images, *more), "checkpoint")
    assert_refused(flora("eval", worked.supernet, "--data", worked.images, "-K", "depth=1"), "arguments")


def test_ranks_apply_to_a_supernet_alone(worked):
    outcome = flora("eval", worked.compact, "--data", worked.images, "--ranks", worked.ranks)
    assert_refused(outcome, "--ranks chooses a subnet of a supernet folder")


def test_a_compact_model_is_not_built_into_a_supernet_again(worked, tmp_path):
    assert_refused(build(worked.compact, tmp_path / "out"), str(worked.compact))
    assert_nothing_at(tmp_path / "out")


def test_a_compact_model_with_layers_left_dense_is_not_built_again(worked, tmp_path):
    """Some layers are above their break-even rank and thus plain: what is built of them could not be loaded."""
    config = json.loads(worked.ranks.read_text())
    config["ranks"]["blocks.0.attn.qkv"] = "dense"
    config["ranks"]["blocks.1.mlp.fc1"] = config["ranks"]["blocks.1.mlp.fc2"] = "dense"
    (tmp_path / "ranks.json").write_text(json.dumps(config))
    mixed = tmp_path / "mixed"
    assert flora("materialize", worked.supernet, "--ranks", tmp_path / "ranks.json", "-o", mixed).code == 0
    assert_refused(build(mixed, tmp_path / "out"), str(mixed))
    assert_nothing_at(tmp_path / "out")


@pytest.mark.parametrize("model", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_layers_that_are_not_called_are_refused_by_name(tmp_path, model):
    torch.manual_seed(0)
    arguments = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    save_file(timm.create_model(model, **arguments).state_dict(), tmp_path / "model.safetensors")
    outcome = build(
        model, tmp_path / "out", "--checkpoint", tmp_path / "model.safetensors", *SMALL, "--layers", "*qkv*"
    )
    if outcome.code == 0:
        pytest.skip(f"{model} calls its layers")
    assert_refused(outcome, "blocks.0.attn.", "reads the weight itself", "--layers")
    assert_nothing_at(tmp_path / "out")


def test_layers_that_the_model_has_not_are_refused_with_those_it_has(worked, tmp_path):
    outcome = build(worked.dense, tmp_path / "out", "--layers", "qkv,fc3")
    assert_refused(outcome, "selected by fc3", "fc1, fc2, head, proj, qkv")
    assert_nothing_at(tmp_path / "out")


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_missing_backend(worked, device):
    outcome = flora("eval", worked.dense, "--data", worked.images, "--device", device)
    assert_refused(outcome, "does not work here", code=4)


@pytest.mark.parametrize("device", ["gpu", "mps", "xpu"])
def test_a_device_that_does_not_work_here_is_refused(worked, device):
    outcome = flora("eval", worked.dense, "--data", worked.images, "--device", device)
    assert outcome.code in (1, 2, 4)
    assert "--device" in outcome.message


def test_each_process_tries_the_gpu_that_it_will_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, given, tried in (
        (None, "cuda", "cuda:0"),
        ("1", "cuda", "cuda:1"),
        ("3", "cuda", "cuda:1"),
        ("1", "cuda:0", "cuda:0"),
        ("1", "cpu", "cpu"),
    ):
        monkeypatch.delenv("LOCAL_RANK", raising=False) if rank is None else monkeypatch.setenv("LOCAL_RANK", rank)
        assert _of_this_process(torch.device(given)) == torch.device(tried)


# Files that are damaged


@pytest.mark.parametrize("name", ["supernet.safetensors", "supernet.json"])
def test_a_truncated_supernet_is_refused(worked, tmp_path, name):
    copy = truncated(worked.supernet, tmp_path / "copy", name)
    assert_refused(flora("materialize", copy, "--uniform", 0.5, "-o", tmp_path / "out"), name)
    assert_nothing_at(tmp_path / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_truncated_model_is_refused_by_every_command(worked, tmp_path, name):
    copy = truncated(worked.compact, tmp_path / "copy", name)
    assert_refused(flora("export", copy, "--eval-data", worked.images, "-o", tmp_path / "out"), name)
    assert_refused(flora("eval", copy, "--data", worked.images), name)
    assert_nothing_at(tmp_path / "out")


def test_an_unknown_key_in_a_config_is_named(worked, tmp_path):
    copy = shutil.copytree(worked.compact, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | {"nonsense": 1}
    (copy / "config.json").write_text(json.dumps(config))
    assert_refused(flora("eval", copy, "--data", worked.images), "config.json", "nonsense")


# Ranks


@pytest.fixture
def ranks(worked, tmp_path):
    """Writes a changed rank config and returns its path."""

    def changed(ranks: dict, **top: object) -> Path:
        config = json.loads(worked.ranks.read_text()) | top
        config["ranks"] |= ranks
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(config))
        return path

    return changed


BAD_RANKS = {
    "zero": {"blocks.0.attn.qkv": 0},
    "negative": {"blocks.0.attn.qkv": -3},
    "full": {"blocks.0.attn.qkv": 48},
    "above full": {"blocks.0.attn.qkv": 49},
}


@pytest.mark.parametrize("change", BAD_RANKS.values(), ids=BAD_RANKS)
def test_a_rank_out_of_range_is_refused_with_the_range(worked, ranks, tmp_path, change):
    path, out = ranks(change), tmp_path / "out"
    words = ("blocks.0.attn.qkv", str(change["blocks.0.attn.qkv"]), "1 to 47")
    assert_refused(flora("materialize", worked.supernet, "--ranks", path, "-o", out), *words)
    exported = flora("export", worked.supernet, "--ranks", path, "--eval-data", worked.images, "-o", out)
    assert_refused(exported, *words)
    assert_refused(flora("eval", worked.supernet, "--ranks", path, "--data", worked.images), *words)
    assert_nothing_at(out)


def test_ranks_for_another_model_are_refused(worked, ranks, tmp_path):
    path = ranks({}, model="deit_base_patch16_224")
    outcome = flora("materialize", worked.supernet, "--ranks", path, "-o", tmp_path / "out")
    assert_refused(outcome, "for deit_base_patch16_224", f"the model is {MODEL}")
    assert_nothing_at(tmp_path / "out")


def test_ranks_of_other_layers_are_refused_by_name(worked, ranks, tmp_path):
    path = ranks({"blocks.7.attn.qkv": 3})
    outcome = flora("materialize", worked.supernet, "--ranks", path, "-o", tmp_path / "out")
    assert_refused(outcome, "not a target of this model: blocks.7.attn.qkv")


@pytest.mark.parametrize("value", [1.5, "half", None, True])
def test_a_rank_that_is_no_whole_number_is_refused(worked, ranks, tmp_path, value):
    path = ranks({"blocks.0.attn.qkv": value})
    outcome = flora("materialize", worked.supernet, "--ranks", path, "-o", tmp_path / "out")
    assert_refused(outcome, "changed.json", "blocks.0.attn.qkv")
    assert_nothing_at(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model": 3}'])
def test_ranks_that_are_no_rank_config_are_refused(worked, tmp_path, text):
    (tmp_path / "ranks.json").write_text(text)
    outcome = flora("materialize", worked.supernet, "--ranks", tmp_path / "ranks.json", "-o", tmp_path / "out")
    assert_refused(outcome, "ranks.json is not a valid RankConfig")


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (("--uniform", "0"), "above 0"),
        (("--uniform", "1.2"), "1.2"),
        (("--uniform", "nan"), "nan"),
        (("--uniform-macs", "1%"), "below the smallest model"),
        (("--uniform-macs", "101%"), "101%"),
        (("--uniform-macs", "nan%"), "nan%"),
        (("--uniform-macs", "inf"), "inf"),
        (("--uniform-macs", "much"), "much"),
        (("--uniform-macs", "-5M"), "-5M"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(worked, tmp_path, choice, words):
    assert_refused(flora("materialize", worked.supernet, *choice, "-o", tmp_path / "out"), words)
    assert_nothing_at(tmp_path / "out")


# Images


@pytest.fixture
def no_images(tmp_path, request) -> Path:
    """A path under which there are no images, by the name of its kind."""
    path = tmp_path / request.param
    if request.param == "text.tar":
        path.write_text("this is no tar file\n" * 60)
    elif request.param == "empty.tar":
        tarfile.open(path, "w").close()
    elif request.param == "notes":
        path.mkdir()
        (path / "notes.txt").write_text("no image")
    elif request.param == "damaged":
        for label in range(10):
            (path / str(label)).mkdir(parents=True)
            (path / str(label) / "0.png").write_text("no image either")
    elif request.param == "photo.png":
        Image.new("L", (28, 28)).save(path)
    return path


KINDS = ["missing", "missing.tar", "notes", "text.tar", "empty.tar", "damaged", "photo.png"]


@pytest.mark.parametrize("no_images", KINDS, indirect=True)
def test_images_that_cannot_be_read_are_refused_by_every_command(worked: WorkedExample, no_images, tmp_path):
    bundle, out = worked.bundle, tmp_path / "out"
    name = "0.png" if no_images.name == "damaged" else no_images.name
    assert_refused(flora("build", worked.dense, "--data", no_images, "-o", out), name)
    assert_refused(flora("eval", worked.dense, "--data", no_images), name)
    assert_refused(flora("verify", bundle, "--data", no_images, "--threads", 1), name)
    if no_images.name != "damaged":  # found when it is decoded, after the export
        assert_refused(flora("export", worked.compact, "--eval-data", no_images, "-o", out), name)
    assert_nothing_at(out)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("images,limit=0", "at least 1"),
        ("images,limit=few", "whole number"),
        ("images,count=3", "unknown option count"),
        ("torch/fashion_mnits,root=none", "fashion_mnist"),
    ],
)
def test_a_set_of_images_that_is_misnamed_is_refused(worked, tmp_path, text, words):
    assert_refused(flora("build", worked.dense, "--data", text, "-o", tmp_path / "out"), words)
    assert_refused(flora("eval", worked.dense, "--data", text), words)
    assert_nothing_at(tmp_path / "out")


def test_images_without_labels_have_no_accuracy(worked, tmp_path):
    Image.new("L", (28, 28)).save(tmp_path / "0.png")
    assert_refused(flora("eval", worked.dense, "--data", tmp_path), "no labels", "one folder for each class")


def test_one_image_calibrates_and_evaluates(worked, tmp_path):
    (tmp_path / "one" / "0").mkdir(parents=True)
    Image.linear_gradient("L").resize((28, 28)).save(tmp_path / "one" / "0" / "0.png")
    built = flora("build", worked.dense, "--data", tmp_path / "one", "-o", tmp_path / "out", "--json")
    assert built.code == 0, built
    evaluated = flora("eval", tmp_path / "out", "--data", tmp_path / "one", "--json")
    assert json.loads(evaluated.out)["images"] == 1


# Outputs


def write_commands(worked: WorkedExample) -> dict[str, list[object]]:
    return {
        "build": ["build", worked.dense, "--method", "svd"],
        "materialize": ["materialize", worked.supernet, "--uniform", 0.5],
        "export": ["export", worked.compact, "--eval-data", worked.images],
    }


@pytest.mark.parametrize("name", ["build", "materialize", "export"])
def test_a_folder_that_holds_other_things_is_not_replaced(worked, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    outcome = flora(*write_commands(worked)[name], "-o", tmp_path / "out")
    assert_refused(outcome, str(tmp_path / "out"), "not replaced", "another output folder")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["build", "materialize", "export"])
def test_a_file_in_the_place_of_the_output_is_not_replaced(worked, tmp_path, name):
    (tmp_path / "out").write_text("years of work")
    outcome = flora(*write_commands(worked)[name], "-o", tmp_path / "out")
    assert_refused(outcome, "is a file or a link")
    assert (tmp_path / "out").read_text() == "years of work"


@pytest.mark.parametrize("name", ["build", "materialize", "export"])
def test_an_output_below_a_file_is_refused(worked, tmp_path, name):
    (tmp_path / "file").write_text("years of work")
    outcome = flora(*write_commands(worked)[name], "-o", tmp_path / "file" / "out")
    assert_refused(outcome, str(tmp_path / "file"))


def test_a_model_is_not_replaced_by_its_own_supernet_or_bundle(worked, tmp_path):
    """The folders of models, supernets and bundles are of different kinds: none takes the place of another."""
    model = shutil.copytree(worked.dense, tmp_path / "model")
    assert_refused(build(model, model), "not replaced")
    assert_refused(flora("export", model, "--eval-data", worked.images, "-o", model), "not replaced")
    assert set(load_file(model / "model.safetensors"))
