"""ONNX graphs for measuring time: one linear layer among its neighbours, and whole models at any ranks.

Both are made from the dense model's file, by what it says of each layer: so nothing is exported again, and a layer is
measured with the operators that a runtime may fuse with it. Weights are random, for time does not depend on them.
"""

import ast
import itertools
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.onnx import SCOPES
from flora.errors import InputError, few
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


def site_graph(site: Site, rank: Rank, batch: int, path: Path, *, opset: int, ir_version: int) -> None:
    """Write the graph of one layer: `x` [batch, tokens, in_features] to `y` [batch, tokens, out_features]."""
    rows = [batch, site.tokens]
    weights = _weights(site.in_features, site.out_features, rank)
    constants = {f"w{i}": weight for i, weight in enumerate(weights)}
    nodes, flowing = [], INPUT
    for name in constants:
        nodes.append(helper.make_node("MatMul", [flowing, name], [f"{name}_out"]))
        flowing = f"{name}_out"
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


def graph_at_ranks(model: ModelProto, shapes: Mapping[str, LayerShape], ranks: Mapping[str, Rank], path: Path) -> None:
    """Write the dense `model` with two factors of random weights in place of each layer that `ranks` factorizes."""
    changed = ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    for name, node in _linear_nodes(changed, shapes).items():
        if not shapes[name].is_factored(ranks[name]):
            continue
        down, up = _weights(shapes[name].in_features, shapes[name].out_features, ranks[name])
        names = [f"{name}.down", f"{name}.up"]
        graph.initializer.extend(
            numpy_helper.from_array(value, key) for value, key in zip((down, up), names, strict=True)
        )
        first = helper.make_node("MatMul", [node.input[0], names[0]], [f"{name}.inner"])
        node.input[:] = [f"{name}.inner", names[1]]
        graph.node.insert(list(graph.node).index(node), first)
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
            scopes = [entry.value for entry in node.metadata_props if entry.key == SCOPES]
            for scope in ast.literal_eval(scopes[0]) if scopes else ():
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


def _weights(in_features: int, out_features: int, rank: Rank) -> list[np.ndarray]:
    """One matrix [in, out], or two factors [in, rank] and [rank, out], so scaled that no number overflows."""
    widths = [in_features, out_features] if rank == "dense" else [in_features, rank, out_features]
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((a, b)) * a**-0.5).astype(np.float32) for a, b in itertools.pairwise(widths)]
