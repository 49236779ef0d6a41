"""An attestation says what products were computed in, whatever the file is called; a requirement holds it to that."""

import json
import platform

import numpy as np
import onnx
import pytest
from export_samples import random_images
from onnx import TensorProto, helper
from onnxruntime.quantization import quantize_dynamic
from pydantic import ValidationError

from calibrate.mixed import write_mixed
from calibrate.ranges import measure_ranges
from calibrate.static import quantize_onnx
from export.attestation import Attestation, Requirement, attest, attest_inspected
from flora.errors import InputError

RUNTIMES = ("ort-cpu", "openvino")
IMAGES = random_images(4)


def products_of(path) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(path).graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]


@pytest.fixture(scope="module")
def quantized(onnx_file, tmp_path_factory):
    """The model in INT8, and again with the first half of its products kept in FP32."""
    folder = tmp_path_factory.mktemp("attestation")
    ranges, products = measure_ranges(onnx_file, [random_images(16)], "min-max"), products_of(onnx_file)
    quantize_onnx(onnx_file, folder / "int8.onnx", ranges)
    low = [node.name for node in products[len(products) // 2 :]]
    write_mixed(onnx_file, folder / "int8.onnx", folder / "kept.onnx", low)
    return folder


@pytest.fixture(scope="module", params=RUNTIMES)
def attested(request, onnx_file, quantized) -> dict[str, Attestation]:
    paths = {"fp32": onnx_file, "int8": quantized / "int8.onnx", "kept": quantized / "kept.onnx"}
    return {name: attest(path, request.param, IMAGES, threads=1) for name, path in paths.items()}


def test_an_fp32_file_is_computed_in_fp32_in_every_product(attested, onnx_file):
    assert attested["fp32"].products == {"fp32": len(products_of(onnx_file))}
    assert attested["fp32"].shares == {"fp32": 1.0}


def test_an_int8_file_is_computed_in_int8_mostly(attested):
    products = attested["int8"].products
    assert products["int8"] > 0.6 * sum(products.values())
    assert attested["int8"].shares["int8"] > 0.5


def test_nodes_that_were_kept_high_are_seen(attested):
    assert 0 < attested["kept"].products["int8"] < attested["int8"].products["int8"]
    assert 0 < attested["kept"].shares["fp32"] < 1


def test_shares_are_of_time_and_sum_to_one_and_the_whole_survives_json(attested):
    for one in attested.values():
        assert one.weighted_by == "time"
        assert sum(one.shares.values()) == pytest.approx(1)
        assert 0 <= one.conversion_share < 1
        assert Attestation.model_validate_json(one.model_dump_json()) == one
    sources = {one.source for one in attested.values()}
    assert sources in ({"profile of ONNX Runtime"}, {"execution graph of OpenVINO"})


def test_a_requirement_holds_or_says_what_is_missing(attested):
    assert Requirement.parse("fp32>=100%").unmet(attested["fp32"]) is None
    assert Requirement.parse("int8>=50%").unmet(attested["int8"]) is None
    assert Requirement.parse("int8>=80%").unmet(attested["fp32"]) == (
        "int8 takes 0 % of the time in products, 80 % are required"
    )


def test_products_that_a_runtime_has_no_int8_kernel_for_are_not_taken_for_int8(quantized):
    """ONNX Runtime computes the patch embedding in FP32, quantize nodes or not, since its output is not quantized."""
    found = attest(quantized / "int8.onnx", "ort-cpu", IMAGES, threads=1)
    assert found.products["fp32"] > 0
    assert found.conversion_share > 0


def test_activations_that_are_quantized_within_a_kernel_count(onnx_file, tmp_path):
    quantize_dynamic(onnx_file, tmp_path / "dynamic.onnx", op_types_to_quantize=["MatMul"])
    assert attest(tmp_path / "dynamic.onnx", "ort-cpu", IMAGES, threads=1).products["int8"] >= 8


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors have FP16 kernels")
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_fp16_file_that_is_computed_in_fp32_is_called_fp32(tmp_path, runtime):
    shape = ["batch", 1, 28, 28]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["images", "weight"], ["logits"])],
        "product",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT16, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT16, shape)],
        [onnx.numpy_helper.from_array(np.ones((28, 28), np.float16), "weight")],
    )
    path = tmp_path / "fp16.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    assert attest(path, runtime, IMAGES.astype(np.float16), threads=1).products == {"fp32": 1}


def test_what_cannot_be_attested_is_refused(onnx_file, tmp_path):
    with pytest.raises(InputError, match="torch runs no ONNX files"):
        attest(onnx_file, "torch", IMAGES)
    with pytest.raises(InputError, match="does not exist"):
        attest(tmp_path / "none.onnx", "ort-cpu", IMAGES)
    with pytest.raises(InputError, match=r"takes float32 images of shape \[any, 1, 28, 28\]"):
        attest(onnx_file, "ort-cpu", IMAGES[:, :, :14])
    shape = ["batch", 1, 28, 28]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("images", "logits")]
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["logits"])], "relu", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "relu")
    with pytest.raises(InputError, match=r"relu shows no matrix product or convolution"):
        attest(tmp_path / "relu", "ort-cpu", IMAGES)


def layer(kind: str, tactic: str, *types: str, key: str = "Format/Datatype") -> dict:
    tensors = [{"Name": f"t{index}", "Dimensions": [8, 50, 192], key: type_} for index, type_ in enumerate(types)]
    return {"Name": tactic, "LayerType": kind, "Inputs": tensors[:-1], "Outputs": tensors[-1:], "TacticName": tactic}


# No TensorRT is at hand: layers as NVIDIA's documentation and its engine explorer show them, and as engines of
# transformers are described in public (Myelin: gemm, fusion, kgen, signal).
SENTENCE = "Thirty-two wide channel vectorized row major Int8 format."
LAYERS = [
    layer("Reformat", "", "Row major linear FP32", SENTENCE),
    layer("CaskConvolution", "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32_nchw", SENTENCE, SENTENCE)
    | {"ParameterType": "Convolution", "Weights": {"Type": "Int8", "Count": 3072}},
    layer("gemm", "sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x64x64", "Int8", "Int8", "Half"),
    layer("fusion", "sm80_xmma_gemm_i8f32_i8i32_f32_by_fusion_tactic", "Half", "Half", "Half"),
    layer("gemm", "ampere_h16816gemm_256x128_ldg8_nn_v1", "Half", "Half"),
    layer("kgen", "_gemm_mha_v2_sm86", "Half", "Half", "Half", "Half"),
    layer("kgen", "__myl_FcCastAddErf", "BFloat16", "BFloat16"),
    layer("gemm", "sm80_xmma_gemm_f32f32_tf32f32_f32_nn", "Float", "Float"),
    layer("gemm", "sm80_xmma_gemm_f32f32_f32f32_f32_nn", "Int64", "Float", "Float"),
    layer("fusion", "pointwise_vectorized", "Half", "Half"),
    layer("kgen", "__myl_MulCasMeaAdd", "Half", "Int8"),
    {"Name": "wait", "LayerType": "wait", "Inputs": [], "Outputs": [], "TacticName": ""},
]


def test_an_engine_is_judged_by_the_kernels_that_its_inspector_names():
    found = attest_inspected(json.dumps({"Layers": LAYERS, "Bindings": ["images", "logits"]}), "it")
    assert found.products == {"int8": 3, "fp16": 2, "bf16": 1, "tf32": 1, "fp32": 1}
    assert found.shares["int8"] == 3 / 8
    assert (found.weighted_by, found.source) == ("count", "engine inspector of TensorRT")
    assert found.conversion_share == 1 / 11
    assert Requirement.parse("int8>=80%").unmet(found) == "int8 takes 37.5 % of the products, 80 % are required"


def test_the_layout_from_tensorrt_11_on_is_read_as_well():
    layers = [
        layer("gemm", "sm89_xmma_gemm", "FP8", "FP8", "Half", key="DataType"),
        layer("gemm", "sm89_xmma_gemm", "Half", "Half", key="DataType"),
    ]
    assert attest_inspected(json.dumps({"Layers": layers, "I/O Tensors": []}), "it").products == {"fp8": 1, "fp16": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"Layers": ["node_linear + node_gelu"]}), "build the engine with ProfilingVerbosity.DETAILED"),
        ("not json", "This is no description of an engine"),
        ("[]", "This is no description of an engine"),
        (json.dumps({"Layers": LAYERS[-2:]}), "shows no matrix product"),
    ],
)
def test_an_engine_that_tells_nothing_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        attest_inspected(text, "it")


def attestation(**shares: float) -> Attestation:
    return Attestation(
        source="profile of ONNX Runtime",
        weighted_by="time",
        shares=shares,
        products=dict.fromkeys(shares, 1),
        conversion_share=0,
    )


def test_a_requirement_may_name_several_precisions():
    both = Requirement.parse("int8 >= 42.5%, fp32>=10 %")
    assert both.least == {"int8": 0.425, "fp32": 0.1}
    assert both.unmet(attestation(int8=0.43, fp32=0.57)) is None
    assert both.unmet(attestation(int8=0.05, fp16=0.95)) == (
        "int8 takes 5 % of the time in products, 42.5 % are required; "
        "fp32 takes 0 % of the time in products, 10 % are required"
    )


def test_what_falls_short_by_little_does_not_read_as_enough():
    assert Requirement.parse("int8>=80%").unmet(attestation(int8=0.79999, fp32=0.20001)) == (
        "int8 takes 79.9 % of the time in products, 80 % are required"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8=>80%", "'int8=>80%' is no requirement; give a precision and the least share .* such as int8>=80%"),
        ("int8>=0.8", "such as int8>=80%"),
        ("", "'' is no requirement"),
        ("int8>=80%,", "'' is no requirement"),
        ("itn8>=80%", "'itn8' is no precision; give one of fp32, fp16, bf16, int8, fp8. Did you mean int8"),
        ("int8>=120%", "between 0 and 100 %, got 120 % of int8"),
        ("int8>=80%,int8>=90%", "names int8 twice"),
        ("int8>=80%,fp16>=30%", "sum to more than 100 %"),
    ],
)
def test_a_malformed_requirement_says_what_is_allowed(text, message):
    with pytest.raises(InputError, match=message):
        Requirement.parse(text)


def test_shares_that_are_none_are_refused_when_a_manifest_is_read():
    text = attestation(int8=0.5, fp32=0.5).model_dump_json()
    for broken in (text.replace('"fp32":0.5', '"fp32":0.9'), text.replace('"int8":1', '"bf16":1')):
        with pytest.raises(ValidationError, match="must sum to 1"):
            Attestation.model_validate_json(broken)
