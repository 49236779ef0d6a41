"""Mixed precision: every choice of products is a sound file, between the two it is made from."""

import numpy as np
import onnx
import pytest

from calibrate.mixed import kind_of, mixed_model, products_by_layer, write_mixed
from calibrate.ranges import measure_ranges
from calibrate.sensitivity import sqnr_db
from calibrate.static import quantize_onnx
from export.runners import OnnxRunner


@pytest.fixture(scope="module")
def quantized(fashion_onnx, calibration, tmp_path_factory):
    path = tmp_path_factory.mktemp("mixed") / "int8.onnx"
    quantize_onnx(fashion_onnx, path, measure_ranges(fashion_onnx, calibration, "min-max"))
    return path


def logits(path, images) -> np.ndarray:
    with OnnxRunner(path, threads=1) as run:
        return run(images)


def test_all_or_nothing_gives_the_two_files_again(fashion_onnx, quantized, test_images, tmp_path):
    source, low = onnx.load(fashion_onnx), onnx.load(quantized)
    every = [name for names in products_by_layer(source, low).values() for name in names]
    for names, twin in ((every, quantized), ([], fashion_onnx)):
        write_mixed(fashion_onnx, quantized, tmp_path / "mixed.onnx", names)
        np.testing.assert_array_equal(logits(tmp_path / "mixed.onnx", test_images), logits(twin, test_images))
        assert (tmp_path / "mixed.onnx").stat().st_size == pytest.approx(twin.stat().st_size, rel=0.02)


def test_layers_are_the_models_own(fashion_onnx, quantized):
    layers = products_by_layer(onnx.load(fashion_onnx), onnx.load(quantized))
    assert set(layers) == {"patch_embed.proj", "head"} | {
        f"blocks.{i}.{name}" for i in range(6) for name in ("attn", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert len(layers["blocks.2.attn"]) == 2
    assert kind_of("blocks.2.mlp.fc1") == kind_of("blocks.5.mlp.fc1") == "blocks.*.mlp.fc1"


def test_what_stays_high_has_its_own_weights_and_less_error(fashion_onnx, quantized, test_images, tmp_path):
    source, low = onnx.load(fashion_onnx), onnx.load(quantized)
    layers = products_by_layer(source, low)
    part = [name for layer, names in layers.items() if "mlp" not in layer for name in names]
    model = mixed_model(source, low, part)
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in source.graph.node:
        kept = next(one for one in model.graph.node if one.name == node.name)
        assert (list(kept.input) == list(node.input)) == (node.name not in part)
    assert constants == {name for node in model.graph.node for name in node.input} & constants
    write_mixed(fashion_onnx, quantized, tmp_path / "mixed.onnx", part)
    expected = logits(fashion_onnx, test_images)
    assert sqnr_db(expected, logits(tmp_path / "mixed.onnx", test_images)) > sqnr_db(
        expected, logits(quantized, test_images)
    )
    assert quantized.stat().st_size < (tmp_path / "mixed.onnx").stat().st_size < fashion_onnx.stat().st_size
