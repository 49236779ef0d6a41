"""`flora calibrate` and `flora sensitivity`: one file in, one file or table out, and what cannot be is refused."""

import json
import shutil

import onnx
import pytest

from calibrate.mixed import products_by_layer
from tests.flora_command import assert_nothing_at, assert_refused, flora, leftovers
from tests.worked_example import FASHION

IMAGES = ("--data", FASHION / "selection.tar", "--calib-images", 16, "--threads", 1)


@pytest.fixture(scope="module")
def found(worked, tmp_path_factory):
    out = tmp_path_factory.mktemp("sensitivity") / "found"
    return out, flora("sensitivity", worked.bundle, *IMAGES, "-o", out, "--json")


def test_every_layer_has_its_error_worst_first_and_a_figure(found, worked):
    out, outcome = found
    assert outcome.code == 0, outcome.message
    table = json.loads((out / "int8-sensitivity.json").read_text())
    assert json.loads(outcome.out) == table
    errors = [layer["sqnr_db"] for layer in table["layers"]]
    assert errors == sorted(errors)
    page = (out / "int8-sensitivity.html").read_text()
    assert {"patch_embed.proj", "blocks.1.attn", "head"} <= {layer["layer"] for layer in table["layers"]}
    assert all(layer["layer"] in page for layer in table["layers"])


def test_a_bundle_becomes_an_int8_file_that_keeps_the_layers_named(found, worked, tmp_path):
    worst = json.loads((found[0] / "int8-sensitivity.json").read_text())["layers"][0]["layer"]
    done = flora("calibrate", worked.bundle, *IMAGES, "--keep", worst, "-o", tmp_path / "int8.onnx", "--json")
    assert done.code == 0, done.message
    said = json.loads(done.out)
    assert said["quantization"]["high"] == {worst: "asked for"}
    assert said["size_bytes"] == (tmp_path / "int8.onnx").stat().st_size < 0.7 * said["source_bytes"]
    assert said["sqnr_db"] > 5
    source = worked.bundle / "onnx" / "model-fp32.onnx"
    low = products_by_layer(onnx.load(source), onnx.load(tmp_path / "int8.onnx"))
    assert worst not in low
    assert len(low) > 5
    twice = flora("calibrate", tmp_path / "int8.onnx", *IMAGES, "-o", tmp_path / "twice.onnx")
    assert_refused(twice, "is quantized already")
    assert leftovers(tmp_path) == []


def test_fp8_is_a_file_of_its_own(worked, tmp_path):
    source = worked.bundle / "onnx" / "model-fp32.onnx"
    done = flora("calibrate", source, *IMAGES, "--precision", "fp8", "-o", tmp_path / "fp8.onnx")
    assert done.code == 0, done.message
    assert "FP32" in done.out
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / "fp8.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT8E4M3FN in kinds


def test_what_cannot_be_calibrated_is_refused(worked, tmp_path):
    out = ("-o", tmp_path / "out.onnx")
    unknown = flora("calibrate", worked.bundle, *IMAGES, "--keep", "blocks.0.mlp.fc3", *out)
    assert_refused(unknown, "no such layer has a product to quantize", "Did you mean blocks.0.mlp.fc")
    assert_refused(flora("calibrate", tmp_path / "no.onnx", *IMAGES, *out), "does not exist")
    assert_refused(flora("calibrate", worked.compact, *IMAGES, *out), "is no bundle")
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes((worked.bundle / "onnx" / "model-fp32.onnx").read_bytes()[:5000])
    assert_refused(flora("calibrate", truncated, *IMAGES, *out), "is no complete ONNX file")
    bare = onnx.load(worked.bundle / "onnx" / "model-fp32.onnx")
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    assert_refused(flora("sensitivity", tmp_path / "bare.onnx", *IMAGES, *out), "how images become its input")
    inside = flora("calibrate", worked.bundle, *IMAGES, "-o", worked.bundle / "onnx" / "int8.onnx")
    assert_refused(inside, "lies in what is quantized")
    copy = shutil.copy(worked.bundle / "onnx" / "model-fp32.onnx", tmp_path / "copy.onnx")
    assert_refused(flora("calibrate", copy, *IMAGES, "-o", copy), "lies in what is quantized")
    seen = flora("calibrate", worked.bundle, "--data", worked.images, *out)
    assert_refused(seen, "are also in the evaluation set")
    unknown = flora("calibrate", worked.bundle, *IMAGES, "--precision", "fp8", "--runtime", "openvino", *out)
    assert_refused(unknown, "openvino runs no files in fp8, only")
    same = flora("calibrate", worked.bundle, *IMAGES, "--select-data", FASHION / "selection.tar", *out)
    assert_refused(same, "are also in the calibration set")
    assert_nothing_at(tmp_path / "out.onnx")
