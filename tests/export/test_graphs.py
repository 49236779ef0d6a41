"""Graphs for measuring: layers keep their neighbours, and models at ranks have the shapes that an export would give."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
from export_samples import tiny_model

from export.graphs import graph_at_ranks, linear_sites, site_graph
from export.runners import OnnxRunner, OpenVinoRunner
from flora.errors import BackendMissingError, InputError
from flora.lowrank.targets import find_targets, trace_cost
from flora.ranks.latency import Site

LAYERS = ("qkv", "proj", "fc1", "fc2")
IMAGES = np.random.default_rng(0).standard_normal((3, 1, 28, 28)).astype(np.float32)


@pytest.fixture(scope="module")
def cost():
    model = tiny_model()
    return trace_cost(model, find_targets(model, LAYERS), (1, 28, 28))


def test_sites_name_what_follows_each_layer(onnx_file: Path, cost):
    sites = linear_sites(onnx.load(onnx_file), cost.shapes)
    after = {name.rsplit(".", 1)[-1]: site.after for name, site in sites.items()}
    assert after == {
        "qkv": ("Add",),
        "proj": ("Add", "Residual"),
        "fc1": ("Add", "Gelu"),
        "fc2": ("Add", "Residual"),
    }
    for name, site in sites.items():
        shape = cost.shapes[name]
        assert (site.in_features, site.out_features, site.tokens) == (
            shape.in_features,
            shape.out_features,
            shape.tokens,
        )


@pytest.mark.parametrize("rank", ["dense", 5])
def test_a_site_runs_and_has_the_products_of_its_rank(tmp_path, rank):
    site = Site(in_features=12, out_features=20, tokens=7, after=("Add", "Gelu", "Residual"))
    path = tmp_path / "layer.onnx"
    site_graph(site, rank, 2, path, opset=20, ir_version=10)
    with OnnxRunner(path) as runner:
        out = runner(np.ones((2, 7, 12), np.float32))
    assert out.shape == (2, 7, 20)
    assert np.isfinite(out).all()
    operators = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert operators == {"MatMul": 1 if rank == "dense" else 2, "Add": 2, "Gelu": 1}


def test_a_pivoted_site_has_the_weights_of_its_form(tmp_path):
    site = Site(in_features=12, out_features=20, tokens=7, after=("Add",))
    path = tmp_path / "layer.onnx"
    site_graph(site, 5, 2, path, pivoted=True, opset=20, ir_version=10)
    with OnnxRunner(path) as runner:
        assert runner(np.ones((2, 7, 12), np.float32)).shape == (2, 7, 20)
    graph = onnx.load(path).graph
    assert Counter(node.op_type for node in graph.node) == {"MatMul": 2, "Concat": 1, "Add": 1}
    assert sum(int(np.prod(tensor.dims)) for tensor in graph.initializer) == 5 * (12 + 20 - 5) + 20


def test_dense_ranks_leave_the_model_as_it_is(onnx_file: Path, tmp_path, cost):
    path = tmp_path / "same.onnx"
    graph_at_ranks(onnx.load(onnx_file), cost.shapes, cost.dense_ranks, path)
    with OnnxRunner(onnx_file) as dense, OnnxRunner(path) as same:
        np.testing.assert_array_equal(same(IMAGES), dense(IMAGES))


@pytest.mark.parametrize("forms", ["factors", "pivoted"])
def test_a_model_at_ranks_has_the_products_and_weights_of_its_cost(onnx_file: Path, tmp_path, cost, forms):
    names = list(cost.shapes)
    ranks = cost.dense_ranks | {names[0]: 3, names[-1]: 1, names[1]: cost.shapes[names[1]].break_even_rank}
    path, dense = tmp_path / "cut.onnx", onnx.load(onnx_file)
    pivoted = [names[1], names[-1]] if forms == "pivoted" else []
    graph_at_ranks(dense, cost.shapes, ranks, path, pivoted)
    changed = onnx.load(path)

    def weights(model) -> int:
        return sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)

    def products(model) -> int:
        return sum(node.op_type == "MatMul" for node in model.graph.node)

    assert products(changed) == products(dense) + 2 + (forms == "pivoted")
    assert weights(dense) - weights(changed) == cost.dense_params - cost.params(ranks, pivoted)
    with OnnxRunner(path) as runner:
        assert np.isfinite(runner(IMAGES)).all()


def test_a_layer_that_the_file_does_not_name_is_refused(onnx_file: Path, cost):
    shape = next(iter(cost.shapes.values()))
    with pytest.raises(InputError, match="names no product as other"):
        linear_sites(onnx.load(onnx_file), {"other": shape})


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.5)])
def test_openvino_computes_in_the_precision_that_it_is_given_or_refuses(onnx_file: Path, precision, tolerance):
    if precision.upper() not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(BackendMissingError, match=r"no instructions for bf16\. Ask for fp32"):
            OpenVinoRunner(onnx_file, threads=1, precision=precision)
        return
    with OnnxRunner(onnx_file) as expected, OpenVinoRunner(onnx_file, threads=1, precision=precision) as runner:
        assert {"fp32": "f32", "bf16": "bf16"}[precision] in runner.provider
        np.testing.assert_allclose(runner(IMAGES), expected(IMAGES), atol=tolerance)


def test_openvino_refuses_what_is_no_model(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        OpenVinoRunner(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(InputError, match="no ONNX file"):
        OpenVinoRunner(tmp_path / "text.onnx")
