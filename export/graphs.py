"""ONNX graphs for measuring time: one linear layer among its neighbours, and whole models at any ranks.

Both are made from the dense model's file, by what it says of each layer: so nothing is exported again, and a layer is
measured with the operators that a runtime may fuse with it. Weights are random, for time does not depend on them.
"""

import itertools
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from flora.errors import InputError, few
from flora.onnxfiles import scopes_of
from flora.ranks.cost import LayerShape, Rank
from flora.ranks.latency import Site

INPUT, OUTPUT = "x", "y"
# Elementwise operators that follow a linear layer with constants of their own, or none.
ELEMENTWISE = ("Add", "Mul", "Gelu", "Relu", "Sigmoid", "Tanh")
RESIDUAL = "Residual"


def linear_sites(model: ModelProto, layers: Mapping[str, LayerShape]) -> dict[str, Site]:
    """The site of each of `layers`: its shape, and the operators that follow it up to the next one that is no such."""
    nodes = _linear_nodes(model, layers)
    constants = {tensor.name for tensor in model.graph.initializer}
    consumers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    return {
        name: Site(
            in_features=shape.in_features,
            out_features=shape.out_features,
            tokens=shape.tokens,
            after=_after(nodes[name], consumers, constants),
        )
        for name, shape in layers.items()
    }


def site_graph(
    site: Site, rank: Rank, batch: int, path: Path, *, pivoted: bool = False, opset: int, ir_version: int
) -> None:
    """Write the graph of one layer: `x` [batch, tokens, in_features] to `y` [batch, tokens, out_features]."""
    rows = [batch, site.tokens]
    nodes, constants = _products(INPUT, "product", site.in_features, site.out_features, rank, pivoted=pivoted)
    flowing = nodes[-1].output[0]
    for i, operator in enumerate(site.after):
        inputs = [flowing]
        if operator in ("Add", "Mul", RESIDUAL):
            like = (*rows, site.out_features) if operator == RESIDUAL else (site.out_features,)
            constants[f"c{i}"] = np.full(like, 0.5, np.float32)
            inputs.append(f"c{i}")
        flowing = f"c{i}_out"
        nodes.append(helper.make_node("Add" if operator == RESIDUAL else operator, inputs, [flowing]))
    nodes[-1].output[0] = OUTPUT
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [*rows, site.in_features])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [*rows, site.out_features])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def graph_at_ranks(
    model: ModelProto,
    shapes: Mapping[str, LayerShape],
    ranks: Mapping[str, Rank],
    path: Path,
    pivoted: Collection[str] = (),
) -> None:
    """Write the dense `model` with factors of random weights in place of each layer that `ranks` factorizes.

    The `pivoted` layers get the pivoted form, at any rank below the full one.
    """
    changed = ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    for name, node in _linear_nodes(changed, shapes).items():
        shape, rank = shapes[name], ranks[name]
        if not shape.is_factored(rank, pivoted=name in pivoted):
            continue
        nodes, constants = _products(
            node.input[0], name, shape.in_features, shape.out_features, rank, pivoted=name in pivoted
        )
        nodes[-1].output[0] = node.output[0]
        graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in constants.items())
        place = list(graph.node).index(node)
        del graph.node[place]
        for offset, new in enumerate(nodes):
            graph.node.insert(place + offset, new)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    onnx.save(changed, path)


def _linear_nodes(model: ModelProto, layers: Collection[str]) -> dict[str, NodeProto]:
    """The product of each of `layers`, which the exporter wrote the names of modules to; `InputError` without one."""
    constants = {tensor.name for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            for scope in scopes_of(node):
                if scope in layers:
                    found[scope] = node
    if missing := [name for name in layers if name not in found]:
        raise InputError(
            f"The ONNX file of the model names no product as {few(missing)}, so their latency cannot be measured. "
            "Leave them out with --layers."
        )
    return found


def _after(node: NodeProto, consumers: Mapping[str, list[NodeProto]], constants: Collection[str]) -> tuple[str, ...]:
    operators: list[str] = []
    while len(users := consumers.get(node.output[0], [])) == 1 and users[0].op_type in ELEMENTWISE:
        (user,) = users
        if all(name == node.output[0] or name in constants for name in user.input):
            operators.append(user.op_type)
        else:
            return (*operators, RESIDUAL) if user.op_type == "Add" else tuple(operators)
        node = user
    return tuple(operators)


def _products(
    x: str, name: str, in_features: int, out_features: int, rank: Rank, *, pivoted: bool
) -> tuple[list[NodeProto], dict[str, np.ndarray]]:
    """Nodes from `x` on, the last of which gives the layer's output without bias, and their random weights.

    One matrix [in, out], or two [in, rank] and [rank, out]; pivoted, the second is [rank, out - rank], and what both
    give is joined. Weights are so scaled that no number overflows, and no two layers have the same: what builds engines
    keeps equal ones once.
    """
    last = out_features - rank if pivoted and rank != "dense" else out_features
    widths = [in_features, last] if rank == "dense" else [in_features, rank, last]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    nodes, constants, flowing = [], {}, [x]
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        constants[f"{name}.w{i}"] = (rng.standard_normal((a, b)) * a**-0.5).astype(np.float32)
        nodes.append(helper.make_node("MatMul", [flowing[-1], f"{name}.w{i}"], [f"{name}.y{i}"]))
        flowing.append(f"{name}.y{i}")
    if last < out_features:
        nodes.append(helper.make_node("Concat", flowing[1:], [f"{name}.y"], axis=-1))
    return nodes, constants
