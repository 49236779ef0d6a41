"""INT8 files: near the model in single precision, a quarter of its size, and in the form that every runtime takes."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from calibrate.ranges import METHODS, measure_ranges
from calibrate.static import quantize_onnx
from export.comparison import compare
from export.runners import OpenVinoRunner
from flora import onnxfiles
from flora.errors import InputError
from tests.calibrate.conftest import logits


@pytest.fixture(scope="module")
def quantized(fashion_onnx, calibration, tmp_path_factory):
    path = tmp_path_factory.mktemp("static") / "int8.onnx"
    quantize_onnx(fashion_onnx, path, measure_ranges(fashion_onnx, calibration, "min-max"))
    return path


@pytest.mark.parametrize("method", METHODS)
def test_it_answers_nearly_as_the_model_does(fashion_onnx, calibration, test_images, tmp_path, method):
    quantize_onnx(fashion_onnx, tmp_path / "int8.onnx", measure_ranges(fashion_onnx, calibration, method))
    difference = compare(logits(fashion_onnx, test_images), logits(tmp_path / "int8.onnx", test_images))
    assert difference.agrees.mean() > 0.9
    assert difference.cosine.mean() > 0.98


def test_openvino_computes_the_same_from_the_same_file(quantized, test_images):
    difference = compare(logits(quantized, test_images), logits(quantized, test_images, OpenVinoRunner))
    assert difference.agrees.mean() > 0.95
    assert difference.cosine.mean() > 0.99


def test_weights_are_bytes_by_channel_and_biases_are_not(fashion_onnx, quantized):
    assert quantized.stat().st_size < 0.32 * fashion_onnx.stat().st_size
    graph = onnx.load(quantized).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    weights = [tensor for tensor in constants.values() if tensor.data_type == TensorProto.INT8 and len(tensor.dims) > 1]
    products = [node for node in onnx.load(fashion_onnx).graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    with_weight = [n for n in products if any(t.name == n.input[1] for t in onnx.load(fashion_onnx).graph.initializer)]
    assert len(weights) == len(with_weight)
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            weight, scales = constants[node.input[0]], constants[node.input[1]]
            axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
            assert list(scales.dims) == [weight.dims[axis]]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = constants[node.input[2]]
            assert not onnx.numpy_helper.to_array(zero).any()
    assert not any(tensor.data_type == TensorProto.INT32 and "bias" in tensor.name for tensor in constants.values())


def test_the_file_names_only_the_operators_that_it_holds_and_keeps_its_metadata(fashion_onnx, quantized):
    model, source = onnx.load(quantized), onnx.load(fashion_onnx)
    assert {one.domain for one in model.opset_import} == {node.domain for node in model.graph.node}
    assert {one.key: one.value for one in source.metadata_props}.items() <= {
        one.key: one.value for one in model.metadata_props
    }.items()
    assert [one.name for one in model.graph.input] == ["images"]
    assert [one.name for one in model.graph.output] == ["logits"]


def test_a_quantized_file_is_not_quantized_again(quantized, calibration, tmp_path):
    ranges = measure_ranges(quantized, calibration, "min-max")
    with pytest.raises(InputError, match="is quantized already; give the file that it was made from"):
        quantize_onnx(quantized, tmp_path / "twice.onnx", ranges)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_lie_beside_the_file_are_found_and_put_beside_it(
    fashion_onnx, quantized, calibration, test_images, tmp_path, monkeypatch
):
    source, out = tmp_path / "in" / "large.onnx", tmp_path / "out" / "int8.onnx"
    source.parent.mkdir()
    onnx.save(onnx.load(fashion_onnx), source, save_as_external_data=True, location="large.onnx.data")
    ranges = measure_ranges(source, calibration, "min-max")
    expected = logits(quantized, test_images)
    for limit, written in ((onnxfiles.LARGEST_INLINE_BYTES, ["int8.onnx"]), (0, ["int8.onnx", "int8.onnx.data"])):
        monkeypatch.setattr(onnxfiles, "LARGEST_INLINE_BYTES", limit)
        quantize_onnx(source, out, ranges)
        assert sorted(path.name for path in out.parent.iterdir()) == written
        np.testing.assert_array_equal(logits(out, test_images), expected)
    assert out.stat().st_size < 300_000
    assert sorted(path.name for path in source.parent.iterdir()) == ["large.onnx", "large.onnx.data"]
