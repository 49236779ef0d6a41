"""Models reload to what was saved, without pickle, and weights that do not fit are refused by name."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flora.errors import InputError
from flora.lowrank import checkpoint
from flora.lowrank.checkpoint import (
    MODEL_CONFIG,
    MODEL_WEIGHTS,
    LoadedModel,
    ModelConfig,
    Reference,
    create_timm_model,
    load_model,
    load_model_folder,
    load_reference,
    load_weights,
    read_weights,
    save_model,
)
from flora.lowrank.materialize import materialize
from tests.samples import FAMILIES, GREY, IMAGE, random_images, random_ranks, tiny_args, tiny_model

VIT = FAMILIES["vit"][0]


def _config(family: str = "vit", **fields) -> ModelConfig:
    return ModelConfig(model=FAMILIES[family][0], args=tiny_args(family), preprocessing=GREY, **fields)


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    save_model(folder, tiny_model(), _config(class_names=tuple("abcdefghij")))
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(tiny_model().state_dict(), path)
    return path


def _same_logits(one: nn.Module, other: nn.Module) -> bool:
    images = random_images(2)
    with torch.no_grad():
        return torch.equal(one(images), other(images))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_reloads_to_the_same_outputs(family: str, tmp_path: Path):
    model = tiny_model(family)
    save_model(tmp_path / "model", model, _config(family))
    assert _same_logits(load_model_folder(tmp_path / "model").module, model)


@pytest.mark.parametrize("seed", range(2))
def test_a_compact_model_reloads_to_the_same_outputs(family_supernet, tmp_path: Path, seed: int):
    dense, supernet, cost = family_supernet
    family = next(name for name in FAMILIES if str(tiny_model(name)) == str(dense))
    first, *others = cost.shapes
    ranks = random_ranks(cost, seed) | {first: cost.shapes[first].full_rank - 1}  # above break-even
    pivoted = (first, *(name for name in others if ranks[name] != "dense"))[: 1 + seed]
    model = materialize(supernet, ranks, pivoted)
    save_model(tmp_path / "model", model, _config(family, ranks=ranks, pivoted=pivoted))
    assert _same_logits(load_model_folder(tmp_path / "model").module, model)


def test_the_config_survives_its_folder(dense_folder: Path):
    assert load_model_folder(dense_folder).config == _config(class_names=tuple("abcdefghij"))


def test_a_folder_is_named_as_a_model(dense_folder: Path):
    assert _same_logits(load_model(str(dense_folder)).module, tiny_model())


def test_a_folder_takes_no_other_arguments(dense_folder: Path):
    with pytest.raises(InputError, match="brings its own"):
        load_model(str(dense_folder), args={"depth": 2})


def test_a_folder_holds_no_pickle(dense_folder: Path):
    assert {path.name for path in dense_folder.iterdir()} == {MODEL_CONFIG, MODEL_WEIGHTS}
    json.loads((dense_folder / MODEL_CONFIG).read_text())
    for path in dense_folder.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, KeyError, EOFError, IndexError)):
            pickle.loads(path.read_bytes())


def test_a_loaded_model_is_in_eval_mode(dense_folder: Path):
    assert not any(module.training for module in load_model_folder(dense_folder).module.modules())


def test_half_precision_reloads_as_single(tmp_path: Path):
    save_model(tmp_path / "model", tiny_model(), _config(), dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / MODEL_WEIGHTS).values()} == {torch.float16}
    loaded = load_model_folder(tmp_path / "model").module.state_dict()
    for name, tensor in tiny_model().state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor.half().float())


def test_weights_are_readable_by_others(dense_folder: Path):
    assert (dense_folder / MODEL_WEIGHTS).stat().st_mode & 0o444 == 0o444


def test_saving_over_a_model_replaces_it(tmp_path: Path):
    save_model(tmp_path / "model", tiny_model(seed=0), _config())
    save_model(tmp_path / "model", tiny_model(seed=1), _config())
    assert _same_logits(load_model_folder(tmp_path / "model").module, tiny_model(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_truncated_safetensors_are_refused_by_name(weights: Path, kept: int):
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"weights\.safetensors is damaged"):
        read_weights(weights)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_truncated_torch_file_is_refused_by_name(tmp_path: Path, kept: int):
    path = tmp_path / "weights.pth"
    torch.save(tiny_model().state_dict(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"weights\.pth"):
        read_weights(path)


def test_a_weights_file_that_is_not_there_is_refused_by_name(tmp_path: Path):
    with pytest.raises(InputError, match=r"nothing\.pth does not exist"):
        read_weights(tmp_path / "nothing.pth")


def test_a_checkpoint_of_another_model_is_refused_with_its_keys(tmp_path: Path):
    save_file(tiny_model("swin").state_dict(), tmp_path / "swin.safetensors")
    with pytest.raises(InputError, match=r"missing: cls_token.*unexpected: .*layers\.0\.blocks\.0"):
        load_model(VIT, args=tiny_args(), checkpoint=tmp_path / "swin.safetensors")


def test_a_checkpoint_of_other_classes_is_refused_with_its_shapes(weights: Path):
    with pytest.raises(InputError, match=r"head\.weight \[10, 48\] instead of \[7, 48\]"):
        load_model(VIT, args={**tiny_args(), "num_classes": 7}, checkpoint=weights)


def test_weights_that_do_not_fit_change_nothing():
    model, state = tiny_model(seed=0), tiny_model(seed=1).state_dict()
    del state["head.bias"]
    with pytest.raises(InputError, match=r"missing: head\.bias"):
        load_weights(model, state, origin="a file")
    assert _same_logits(model, tiny_model(seed=0))


@pytest.mark.parametrize("wrapped", ["state_dict", "model", "model_ema", None])
def test_a_torch_checkpoint_loads_wrapped_or_bare(tmp_path: Path, wrapped: str | None):
    path, state = tmp_path / "weights.pth", tiny_model().state_dict()
    torch.save({wrapped: state, "epoch": 3} if wrapped else state, path)
    assert _same_logits(load_model(VIT, args=tiny_args(), checkpoint=path).module, tiny_model())


def test_a_safetensors_checkpoint_loads(weights: Path):
    assert _same_logits(load_model(VIT, args=tiny_args(), checkpoint=weights).module, tiny_model())


def test_the_preprocessing_of_a_checkpoint_is_that_of_the_model_it_makes(weights: Path):
    """A model for 28 pixels and one channel must not be fed the 224 pixels and three channels of its timm name."""
    assert load_model(VIT, args=tiny_args(), checkpoint=weights).config.preprocessing.input_size == IMAGE


class _Code:
    """Unpickling this creates a file: the proof that code has run."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", ["weights.pth", "weights.bin"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, name: str):
    torch.save({"state_dict": tiny_model().state_dict(), "extra": _Code(tmp_path / "trace")}, tmp_path / name)
    with pytest.raises(InputError, match=name):
        read_weights(tmp_path / name)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), "text"])
def test_a_torch_file_without_named_weights_is_refused(tmp_path: Path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights\.pth"):
        load_model(VIT, args=tiny_args(), checkpoint=tmp_path / "weights.pth")


@pytest.mark.parametrize("value", [3, "text", [1.0], None])
def test_a_torch_file_whose_entries_are_no_tensors_is_refused(tmp_path: Path, value):
    torch.save(dict.fromkeys(tiny_model().state_dict(), value), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights\.pth"):
        load_model(VIT, args=tiny_args(), checkpoint=tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_244", "deit_base_patch16_225", "swim_tiny_patch4_window7_224"])
def test_an_unknown_model_is_refused_with_near_matches(name: str):
    near = name.replace("244", "224").replace("225", "224").replace("swim", "swin")
    with pytest.raises(InputError, match=rf"{name}.*Did you mean.*{near}"):
        load_model(name)


def test_an_unknown_pretrained_tag_is_refused_by_name():
    with pytest.raises(InputError, match="nonsense_tag"):
        create_timm_model(f"{VIT}.nonsense_tag", {})


def test_an_unknown_argument_is_refused_by_name():
    with pytest.raises(InputError, match="depht"):
        create_timm_model(VIT, {"depht": 2})


@pytest.mark.parametrize("arguments", [{"depth": "two"}, {"num_heads": 5}, {"act_layer": "nonsense"}])
def test_an_argument_of_a_wrong_value_is_refused_by_name(arguments: dict):
    with pytest.raises(InputError, match=next(iter(arguments))):
        create_timm_model(VIT, arguments)


def test_random_weights_are_refused():
    with pytest.raises(InputError, match=r"random weights.*--checkpoint"):
        load_model(VIT, args=tiny_args())


def test_a_folder_without_config_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=MODEL_CONFIG):
        load_model(str(tmp_path))


def test_a_config_with_ranks_of_layers_that_are_not_there_is_refused(tmp_path: Path):
    save_model(tmp_path / "model", tiny_model(), _config(ranks={"blocks.7.mlp.fc1": 4}))
    with pytest.raises(InputError, match=r"blocks\.7\.mlp\.fc1"):
        load_model_folder(tmp_path / "model")


def test_a_reference_is_the_file_that_was_recorded(weights: Path):
    digest = checkpoint.sha256_of_file(weights)
    config = _config(ranks={}, reference=Reference(path=str(weights), sha256=digest))
    reference = load_reference(config)
    assert isinstance(reference, LoadedModel)
    assert _same_logits(reference.module, tiny_model())


def test_a_reference_that_has_changed_is_refused(weights: Path):
    config = _config(reference=Reference(path=str(weights), sha256="0" * 64))
    with pytest.raises(InputError, match=r"weights\.safetensors has changed.*--reference"):
        load_reference(config)


def test_a_reference_that_is_gone_is_none(tmp_path: Path):
    config = _config(reference=Reference(path=str(tmp_path / "gone.safetensors"), sha256="0" * 64))
    assert load_reference(config) is None
    assert load_reference(_config()) is None
