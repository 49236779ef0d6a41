"""FP16 and BF16 files: half the size, near the model, with what needs FP32 in FP32, and overflow that does not hide."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibrate.files import open_session
from calibrate.half import PRECISIONS, check_fits_fp16, half_onnx
from calibrate.ranges import measure_ranges
from calibrate.static import quantize_onnx
from export.comparison import compare
from export.runners import OnnxRunner, OpenVinoRunner
from flora import onnxfiles
from flora.errors import InputError
from tests.calibrate.conftest import logits


@pytest.fixture(scope="module")
def halves(fashion_onnx, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    for precision in PRECISIONS:
        half_onnx(fashion_onnx, folder / f"{precision}.onnx", precision)
    return {precision: folder / f"{precision}.onnx" for precision in PRECISIONS}


def types_of_values(path) -> dict[str, int]:
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return types | {value.name: value.type.tensor_type.elem_type for value in values}


def planted(source, path, value: float, name="blocks.3.mlp.fc1.bias"):
    """The file with one bias of one layer at `value`."""
    model = onnx.load(source)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    bias.CopyFrom(numpy_helper.from_array(np.full(bias.dims[0], value, np.float32), name))
    onnx.save(model, path)
    return path


def test_fp16_answers_as_the_model_does(fashion_onnx, halves, test_images):
    difference = compare(logits(fashion_onnx, test_images), logits(halves["fp16"], test_images))
    assert difference.agrees.mean() >= 0.98
    assert difference.cosine.mean() >= 0.9999


def test_bf16_answers_as_the_model_does_on_openvino_for_onnx_runtime_has_no_kernels(fashion_onnx, halves, test_images):
    difference = compare(logits(fashion_onnx, test_images), logits(halves["bf16"], test_images, OpenVinoRunner))
    assert difference.agrees.mean() >= 0.98
    assert difference.cosine.mean() >= 0.999
    with pytest.raises(InputError, match="Could not find an implementation"):
        OnnxRunner(halves["bf16"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_halved_and_sums_are_not(fashion_onnx, halves, precision):
    assert halves[precision].stat().st_size < 0.51 * fashion_onnx.stat().st_size
    types = types_of_values(halves[precision])
    for node in onnx.load(halves[precision]).graph.node:
        if node.op_type in ("MatMul", "Gemm", "Gelu", "Add"):
            assert {types[name] for name in (*node.input, *node.output)} <= {PRECISIONS[precision], TensorProto.INT64}
        if node.op_type in ("LayerNormalization", "Softmax"):
            assert {types[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT}
    assert (types["images"], types["logits"]) == (TensorProto.FLOAT, TensorProto.FLOAT)


def test_a_value_is_cast_once_and_never_back_at_once(halves):
    nodes = onnx.load(halves["fp16"]).graph.node
    casts = [node for node in nodes if node.op_type == "Cast"]
    assert len({node.input[0] for node in casts}) == len(casts)
    assert not {node.input[0] for node in casts} & {node.output[0] for node in casts}
    assert len({node.name for node in nodes}) == len(nodes)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_file_keeps_its_metadata_and_says_which_layer_a_node_is_of(fashion_onnx, halves, precision):
    model, source = onnx.load(halves[precision]), onnx.load(fashion_onnx)
    assert list(model.metadata_props) == list(source.metadata_props)
    assert list(model.opset_import) == list(source.opset_import)
    scopes = {node.name: list(node.metadata_props) for node in model.graph.node}
    assert all(scopes[node.name] == list(node.metadata_props) for node in source.graph.node)


def test_an_output_that_other_nodes_read_and_constants_in_nodes_are_cast_as_well(tmp_path):
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 4])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("sum", "shares")]
    one = numpy_helper.from_array(np.arange(4, dtype=np.float32))
    nodes = [
        helper.make_node("Constant", [], ["one"], value=one),
        helper.make_node("Add", ["images", "one"], ["sum"]),
        helper.make_node("Mul", ["sum", "one"], ["product"]),
        helper.make_node("Softmax", ["product"], ["shares"]),
    ]
    graph = helper.make_graph(nodes, "g", [images], outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    half_onnx(tmp_path / "m.onnx", tmp_path / "half.onnx", "fp16")
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    np.testing.assert_allclose(logits(tmp_path / "half.onnx", x), logits(tmp_path / "m.onnx", x), rtol=1e-2)


def test_a_weight_beyond_the_range_is_named(fashion_onnx, tmp_path):
    large = planted(fashion_onnx, tmp_path / "large.onnx", 70_000.0)
    with pytest.raises(InputError, match=r"blocks\.3\.mlp\.fc1\.bias in .* holds 7e\+04, beyond the range of fp16"):
        half_onnx(large, tmp_path / "half.onnx", "fp16")
    assert not (tmp_path / "half.onnx").exists()
    half_onnx(large, tmp_path / "half.onnx", "bf16")


def test_activations_that_overflow_are_found_though_onnx_runtime_hides_them(
    fashion_onnx, calibration, test_images, tmp_path
):
    large = planted(fashion_onnx, tmp_path / "large.onnx", 60_000.0)
    half_onnx(large, tmp_path / "half.onnx", "fp16")
    assert np.isfinite(logits(tmp_path / "half.onnx", test_images)).all()
    with pytest.raises(InputError, match=r"^node_\S+ in .*large\.onnx reaches \S+ on an image, beyond the range"):
        check_fits_fp16(large, calibration[:1])
    check_fits_fp16(fashion_onnx, calibration)


def test_an_image_on_which_it_overflows_may_be_any(fashion_onnx, calibration, tmp_path):
    beside = tmp_path / "beside.onnx"
    onnx.save(onnx.load(fashion_onnx), beside, save_as_external_data=True, location="beside.onnx.data")
    extreme = calibration[2].copy()
    extreme[5] *= 1e6
    check_fits_fp16(beside, calibration)
    with pytest.raises(InputError, match="beyond the range of fp16"):
        check_fits_fp16(beside, [*calibration[:2], extreme])


def test_around_quantized_products_everything_is_in_half_precision_scales_included(
    fashion_onnx, calibration, test_images, tmp_path
):
    low, half = tmp_path / "int8.onnx", tmp_path / "half.onnx"
    quantize_onnx(fashion_onnx, low, measure_ranges(fashion_onnx, calibration, "min-max"))
    half_onnx(low, half, "fp16")
    types = types_of_values(half)
    for node in onnx.load(half).graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert types[node.input[1]] == TensorProto.FLOAT16
        if node.op_type == "MatMul":
            assert {types[name] for name in node.input} == {TensorProto.FLOAT16}
    sessions = [open_session(file, 1, as_written=True) for file in (low, half)]
    expected, found = (session.run(None, {"images": test_images})[0] for session in sessions)
    assert compare(expected, found).cosine.mean() > 0.999


def test_a_scale_too_small_for_fp16_does_not_become_zero(tmp_path):
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 4])
    logits_out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])
    constants = [numpy_helper.from_array(np.float32(1e-9), "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "g", [images], [logits_out], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    half_onnx(tmp_path / "m.onnx", tmp_path / "half.onnx", "fp16")
    assert np.isfinite(logits(tmp_path / "half.onnx", np.zeros((1, 4), np.float32))).all()


def test_an_unknown_precision_is_refused(fashion_onnx, tmp_path):
    with pytest.raises(InputError, match=r"'fp6' is no half precision; give one of fp16, bf16\. Did you mean fp16"):
        half_onnx(fashion_onnx, tmp_path / "half.onnx", "fp6")
    assert not list(tmp_path.iterdir())


def test_weights_too_large_for_one_file_go_beside_it(halves, fashion_onnx, test_images, tmp_path, monkeypatch):
    monkeypatch.setattr(onnxfiles, "LARGEST_INLINE_BYTES", 0)
    half_onnx(fashion_onnx, tmp_path / "half.onnx", "fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.onnx", "half.onnx.data"]
    assert np.array_equal(logits(tmp_path / "half.onnx", test_images), logits(halves["fp16"], test_images))
