"""FP8 files: the INT8 graph with codes of eight-bit floats, nearly as near the model, and a quarter of its size."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibrate.float8 import quantize_onnx_to_float8
from calibrate.ranges import measure_ranges
from export.comparison import compare
from flora.errors import InputError
from tests.calibrate.conftest import logits

FLOAT8 = TensorProto.FLOAT8E4M3FN
PAIRS = ("QuantizeLinear", "DequantizeLinear")


@pytest.fixture(scope="module")
def ranges(fashion_onnx, calibration):
    return measure_ranges(fashion_onnx, calibration, "min-max")


@pytest.fixture(scope="module")
def quantized(fashion_onnx, ranges, tmp_path_factory):
    path = tmp_path_factory.mktemp("float8") / "fp8.onnx"
    quantize_onnx_to_float8(fashion_onnx, path, ranges)
    return path


@pytest.mark.parametrize("method", ["min-max", "entropy"])
def test_it_answers_nearly_as_the_model_does(fashion_onnx, calibration, test_images, tmp_path, method):
    quantize_onnx_to_float8(fashion_onnx, tmp_path / "fp8.onnx", measure_ranges(fashion_onnx, calibration, method))
    difference = compare(logits(fashion_onnx, test_images), logits(tmp_path / "fp8.onnx", test_images))
    assert difference.agrees.mean() > 0.95
    assert difference.cosine.mean() > 0.995


def test_weights_are_eight_bit_floats_of_which_each_channel_uses_all(fashion_onnx, quantized):
    assert quantized.stat().st_size < 0.32 * fashion_onnx.stat().st_size
    constants = {tensor.name: tensor for tensor in onnx.load(quantized).graph.initializer}
    source = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(fashion_onnx).graph.initializer}
    pairs = [node for node in onnx.load(quantized).graph.node if node.op_type in PAIRS]
    weights = [node for node in pairs if node.input[0] in constants]
    assert len(weights) == 26
    for node in weights:
        weight, scales, zero = (numpy_helper.to_array(constants[name]) for name in node.input)
        axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
        codes = np.moveaxis(weight.astype(np.float32), axis, -1).reshape(-1, weight.shape[axis])
        assert (constants[node.input[0]].data_type, constants[node.input[2]].data_type) == (FLOAT8, FLOAT8)
        assert (np.abs(codes).max(0) == 448).all()
        assert not zero.astype(np.float32).any()
        original = np.moveaxis(source[node.input[0].removesuffix("_quantized")], axis, -1).reshape(codes.shape)
        # Three bits of mantissa: an error of a sixteenth, or of half the smallest code.
        assert (np.abs(codes * scales - original) <= np.maximum(np.abs(original) / 15, scales * 2**-9)).all()
    assert not any(tensor.data_type == TensorProto.INT8 for tensor in constants.values())


def test_the_largest_value_of_a_range_becomes_the_largest_code(ranges, quantized):
    graph = onnx.load(quantized).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    activations = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    for node in activations:
        largest = np.abs(np.ravel(ranges.tensors[node.input[0]].range_value)).max()
        np.testing.assert_allclose(constants[node.input[1]] * 448, largest, rtol=1e-5)
    assert len(activations) > 26


def test_the_file_keeps_its_metadata_and_what_goes_in_and_out(fashion_onnx, quantized):
    model, source = onnx.load(quantized), onnx.load(fashion_onnx)
    assert {one.domain for one in model.opset_import} == {node.domain for node in model.graph.node}
    assert {one.key: one.value for one in source.metadata_props}.items() <= {
        one.key: one.value for one in model.metadata_props
    }.items()
    assert list(model.graph.input) == list(source.graph.input)
    assert list(model.graph.output) == list(source.graph.output)


def test_a_quantized_file_and_an_opset_without_the_type_are_refused(fashion_onnx, quantized, ranges, tmp_path):
    with pytest.raises(InputError, match="is quantized already"):
        quantize_onnx_to_float8(quantized, tmp_path / "twice.onnx", ranges)
    model = onnx.load(fashion_onnx)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", 18))
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(InputError, match=r"old\.onnx is of opset 18, FP8 needs 19; export it at opset 20"):
        quantize_onnx_to_float8(tmp_path / "old.onnx", tmp_path / "fp8.onnx", ranges)
    assert [path.name for path in tmp_path.iterdir()] == ["old.onnx"]
