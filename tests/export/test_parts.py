"""Time is attributed to the parts of a model: all of it, and to the part that it was spent in."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from export_samples import FAMILIES, GREY, random_images, tiny_model
from onnx import TensorProto, helper, numpy_helper

from export.onnx import onnx_from_module
from export.parts import ATTENTION, HEAD, NORM, OTHER, PATCHES, in_order, part_of, time_shares
from flora.onnxfiles import SCOPES

LINEARS = {"qkv", "proj", "fc1", "fc2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_time_is_spent_in_some_part_and_little_in_none_that_is_known(tmp_path, family):
    path = tmp_path / "model.onnx"
    onnx_from_module(tiny_model(family), path, preprocessing=GREY)
    shares = time_shares(path, random_images(4), threads=1)
    assert sum(shares.values()) == pytest.approx(1)
    assert {PATCHES, NORM, ATTENTION, HEAD, *LINEARS} <= shares.keys()
    assert all(share > 0 for share in shares.values())
    assert shares[OTHER] < 0.3
    assert list(shares) == in_order(shares)


def test_the_part_with_nearly_all_the_work_has_nearly_all_the_time(tmp_path):
    """Of two parts one has 4,160 times the products; bias and GELU, which runtimes fuse, hide neither."""
    path = tmp_path / "two.onnx"
    _two_layers(path, small=16, large=1024)
    shares = time_shares(path, np.ones((64, 16), np.float32), threads=1)
    assert shares["fc2"] > 0.8
    assert shares.get(OTHER, 0.0) == 0


def test_a_node_of_no_module_is_of_no_known_part(tmp_path):
    path = tmp_path / "two.onnx"
    _two_layers(path, small=16, large=64)
    model = onnx.load(path)
    for node in model.graph.node:
        node.ClearField("metadata_props")
    onnx.save(model, path)
    assert time_shares(path, np.ones((8, 16), np.float32), threads=1) == {OTHER: 1.0}


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("patch_embed.proj", PATCHES),
        ("blocks.0.attn.qkv.down", "qkv"),
        ("blocks.0.attn.qkv.up", "qkv"),
        ("blocks.0.attn.qkv", "qkv"),
        ("blocks.0.attn", ATTENTION),
        ("blocks.0.attn.softmax", ATTENTION),
        ("blocks.0.norm1", NORM),
        ("layers.1.downsample.reduction", "reduction"),
        ("layers.1.downsample.norm", NORM),
        ("blocks.0.mlp.act", "activation"),
        ("head.fc", HEAD),
        ("", OTHER),
        ("blocks.0", OTHER),
    ],
)
def test_modules_belong_to_parts_by_their_names(module, part):
    assert part_of(module, {"patch_embed.proj", "blocks.0.attn.qkv", "layers.1.downsample.reduction"}) == part


def _two_layers(path: Path, *, small: int, large: int) -> None:
    """Two linear layers with bias and GELU, the second from `small` to `large` squared."""
    rng = np.random.default_rng(0)
    sizes = {"fc1": (small, small), "fc2": (small, large), "fc3": (large, large)}
    nodes, constants, flowing = [], [], "x"
    for name, shape in sizes.items():
        constants += [
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), f"{name}.w"),
            numpy_helper.from_array(np.ones(shape[1], np.float32), f"{name}.b"),
        ]
        for operator, inputs, module in (
            ("MatMul", [flowing, f"{name}.w"], name),
            ("Add", [f"{name}.m", f"{name}.b"], name),
            ("Gelu", [f"{name}.a"], name),
        ):
            output = {"MatMul": f"{name}.m", "Add": f"{name}.a", "Gelu": f"{name}.y"}[operator]
            node = helper.make_node(operator, inputs, [output], name=output)
            node.metadata_props.add(key=SCOPES, value=str(["", f"mlp.{'fc2' if module == 'fc3' else module}", "op"]))
            nodes.append(node)
        flowing = f"{name}.y"
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", small])],
        [helper.make_tensor_value_info(flowing, TensorProto.FLOAT, ["batch", large])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
