"""The exported file computes what the module computes, at any batch, and leaves the module as it was."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_samples import FAMILIES, GREY, random_images, tiny_model
from torch import nn

from export import onnx as onnx_export
from export.onnx import onnx_from_module
from flora import onnxfiles
from flora.errors import FloraError, InputError
from flora.onnxfiles import load_onnx


def _run(path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def _logits(model: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_torch_at_batches_1_3_and_8(family, tmp_path):
    model = tiny_model(family)
    onnx_from_module(model, tmp_path / "m.onnx", preprocessing=GREY)
    for batch in (1, 3, 8):
        images = random_images(batch, seed=batch)
        expected = _logits(model, images)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(_run(tmp_path / "m.onnx", images), expected, atol=1e-4)


def test_attention_and_training_flags_are_as_before(tmp_path):
    model = tiny_model().train()
    model.blocks[1].eval()
    model.blocks[0].attn.fused_attn = "as it was"
    flags = [layer.training for layer in model.modules()]
    with onnx_export.eager_attention_of(model):
        assert not any(getattr(layer, "fused_attn", False) for layer in model.modules())
    assert model.blocks[0].attn.fused_attn == "as it was"
    onnx_from_module(model, tmp_path / "m.onnx", preprocessing=GREY)
    assert [layer.training for layer in model.modules()] == flags
    assert model.blocks[0].attn.fused_attn == "as it was"


def test_eager_attention_is_written_as_two_products(onnx_file, tmp_path, model):
    onnx_from_module(model, tmp_path / "fused.onnx", preprocessing=GREY, eager_attention=False)
    eager, fused = (len(onnx.load(path).graph.node) for path in (onnx_file, tmp_path / "fused.onnx"))
    assert eager < fused


def test_the_file_says_what_it_takes_and_gives(onnx_file):
    file = load_onnx(onnx_file)
    described = {entry.key: entry.value for entry in file.metadata_props}
    assert type(GREY).model_validate_json(described["flora.preprocessing"]) == GREY
    assert json.loads(described["flora.class_names"])[3] == "class 3"
    assert described["flora.output"] == file.graph.output[0].name == "logits"
    assert file.opset_import[0].version == 20
    assert b"stack_trace" not in onnx_file.read_bytes()


def test_normalization_and_softmax_in_the_graph_change_nothing(tmp_path, model, onnx_file):
    onnx_from_module(model, tmp_path / "all.onnx", preprocessing=GREY, normalize=True, softmax=True)
    pixels = np.random.default_rng(0).random((3, *GREY.input_size), dtype=np.float32)
    logits = _run(onnx_file, (pixels - np.float32(GREY.mean[0])) / np.float32(GREY.std[0]))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(_run(tmp_path / "all.onnx", pixels), shares, atol=1e-5)


def test_weights_that_are_too_large_for_one_file_go_beside_it(tmp_path, model, onnx_file, monkeypatch):
    monkeypatch.setattr(onnxfiles, "LARGEST_INLINE_BYTES", 0)
    onnx_from_module(model, tmp_path / "m.onnx", preprocessing=GREY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert (tmp_path / "m.onnx").stat().st_size < 500_000
    assert np.array_equal(_run(tmp_path / "m.onnx", random_images(2)), _run(onnx_file, random_images(2)))
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(InputError, match=r"does not exist|no complete"):
        load_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("opset", [16, 26])
def test_an_opset_outside_the_range_is_refused(opset, tmp_path, model):
    with pytest.raises(InputError, match=f"Opset {opset}.*17 to 25"):
        onnx_from_module(model, tmp_path / "m.onnx", preprocessing=GREY, opset=opset)


def test_class_names_must_fit_the_model(tmp_path, model):
    with pytest.raises(InputError, match=r"1 class names.*10 classes"):
        onnx_from_module(model, tmp_path / "m.onnx", preprocessing=GREY, class_names=["only"])


class Undecided(nn.Linear):
    """Takes its way by the values, which no graph can hold."""

    def forward(self, images):
        return super().forward(images.flatten(1)) if images.sum() > 0 else images


class BatchOfTwo(nn.Linear):
    """Refuses any other batch; the exporter takes the two for a constant."""

    def forward(self, images):
        assert len(images) == 2
        return super().forward(images.flatten(1))


class FixedBatch(nn.Linear):
    """Gives two rows whatever it is given."""

    def forward(self, images):
        return super().forward(images.flatten(1)).view(2, -1)


@pytest.mark.parametrize("module", [Undecided(784, 10), FixedBatch(784, 10), BatchOfTwo(784, 10), nn.Linear(3, 3)])
def test_a_module_that_cannot_be_exported_is_named_and_leaves_no_file(module, tmp_path, capfd):
    with pytest.raises(FloraError, match=f"{type(module).__name__} cannot be exported to ONNX at opset 20"):
        onnx_from_module(module, tmp_path / "m.onnx", preprocessing=GREY)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_a_truncated_file_is_refused(keep, onnx_file, tmp_path):
    content = onnx_file.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=r"cut\.onnx is no complete ONNX file"):
        load_onnx(tmp_path / "cut.onnx")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_onnx(tmp_path / "none.onnx")
