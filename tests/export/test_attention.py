"""An attention block counts as fused where one kernel was made of both of its products and its softmax."""

import json

import onnx
import pytest
from export_samples import random_images

from calibrate.half import half_onnx
from calibrate.ranges import measure_ranges
from calibrate.static import quantize_onnx
from export.attention import attention_blocks, fused_blocks
from export.attestation import attest, attest_inspected
from export.onnx import onnx_from_module
from tests.samples import FAMILIES, GREY, tiny_model


@pytest.fixture(scope="module", params=FAMILIES)
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    onnx_from_module(tiny_model(request.param), path, preprocessing=GREY)
    return path


def test_each_softmax_has_its_two_products(file):
    nodes = {node.name: node for node in onnx.load(file).graph.node}
    blocks = attention_blocks(file)
    assert len(blocks) == sum(node.op_type == "Softmax" for node in nodes.values()) > 1
    assert len(set().union(*blocks)) == 3 * len(blocks)
    for block in blocks:
        softmax = next(nodes[name] for name in block if nodes[name].op_type == "Softmax")
        before, after = (nodes[name] for name in nodes if name in block and name != softmax.name)
        weights = {tensor.name for tensor in onnx.load(file).graph.initializer}
        assert {before.op_type, after.op_type} == {"MatMul"}
        assert not weights & {*before.input, *after.input}


def test_blocks_are_found_in_lower_precisions_as_well(file, tmp_path):
    quantize_onnx(file, tmp_path / "int8.onnx", measure_ranges(file, [random_images(4)], "min-max"))
    half_onnx(tmp_path / "int8.onnx", tmp_path / "half.onnx", "fp16")
    assert (
        attention_blocks(tmp_path / "int8.onnx") == attention_blocks(tmp_path / "half.onnx") == attention_blocks(file)
    )


def test_openvino_fuses_attention_and_onnx_runtime_does_not(onnx_file):
    blocks = len(attention_blocks(onnx_file))
    found = {runtime: attest(onnx_file, runtime, random_images(2), threads=1) for runtime in ("openvino", "ort-cpu")}
    assert {one.attention_blocks for one in found.values()} == {blocks}
    assert (found["openvino"].fused_attention, found["ort-cpu"].fused_attention) == (blocks, 0)


def test_a_block_in_several_kernels_is_not_fused():
    first, second = frozenset(("qk", "softmax", "av")), frozenset(("qk1", "softmax1", "av1"))
    kernels = [frozenset(("qk", "softmax", "av", "scale")), frozenset(("qk1", "softmax1")), frozenset(("av1",))]
    assert fused_blocks([first, second], kernels) == 1


def layer(name: str, tactic: str, *nodes: str) -> dict:
    """A layer as in NVIDIA/TensorRT issue 4397, where the nodes that it was made of are its metadata."""
    tensor = {"Name": "__mye1", "Dimensions": [4, 40, 64], "Format/Datatype": "Half"}
    told = {"Metadata": "".join(f"[ONNX Layer: {node}]" for node in nodes)} if nodes else {}
    return {"Name": name, "LayerType": "kgen", "Inputs": [tensor], "Outputs": [tensor], "TacticName": tactic} | told


def test_an_engine_tells_what_its_kernels_were_made_of(onnx_file):
    first, second, *_ = attention_blocks(onnx_file)
    layers = [
        layer("_gemm_mha_v2_myl0_17", "_gemm_mha_v2_0x957a2fe283f77dcf35c142c1390a3e6a", *first, "node_mul"),
        *(layer(f"part {number}", "sm80_xmma_gemm_f16f16", node) for number, node in enumerate(second)),
    ]
    found = attest_inspected(json.dumps({"Layers": layers}), "it", onnx_file)
    assert (found.attention_blocks, found.fused_attention) == (2, 1)
    untold = [one | {"Metadata": ""} for one in layers]
    found = attest_inspected(json.dumps({"Layers": untold}), "it", onnx_file)
    assert (found.attention_blocks, found.fused_attention) == (2, None)
    assert attest_inspected(json.dumps({"Layers": layers}), "it").attention_blocks is None
