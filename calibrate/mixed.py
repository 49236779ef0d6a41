"""Mixed precision: any choice of a model's products in low precision, out of the file that has all of them so.

Layers are what a user names: the products of `blocks.3.attn.qkv` go together, its two factors included, and so do the
two of an attention.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto

from calibrate.ranges import OPERATORS
from flora.onnxfiles import layer_of, save_onnx

CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")


def products_by_layer(source: ModelProto, quantized: ModelProto) -> dict[str, list[str]]:
    """The names of the products that are in low precision in `quantized`, by layer, in the order of `source`."""
    converted = {node.output[0] for node in quantized.graph.node if node.op_type == "DequantizeLinear"}
    low = {node.name for node in quantized.graph.node if node.op_type in OPERATORS and converted & set(node.input)}
    layers: dict[str, list[str]] = {}
    for node in source.graph.node:
        if node.name in low:
            layers.setdefault(layer_of(node), []).append(node.name)
    return layers


def products_but(layers: Mapping[str, Sequence[str]], high: Collection[str]) -> list[str]:
    """The products of all `layers` but those called `high`."""
    return [product for layer, products in layers.items() if layer not in high for product in products]


def mixed_model(source: ModelProto, quantized: ModelProto, low: Collection[str]) -> ModelProto:
    """`source` with the products called `low` as they are in `quantized`, all others as they were."""
    taken = {node.name: node for node in quantized.graph.node if node.name in low}
    conversions = {node.output[0]: node for node in quantized.graph.node if node.op_type in CONVERSIONS}
    nodes: list[NodeProto] = []
    placed: set[str] = set()
    for node in source.graph.node:
        for name in taken[node.name].input if node.name in taken else ():
            for needed in _leading_to(name, conversions):
                if needed.name not in placed:
                    placed.add(needed.name)
                    nodes.append(needed)
        nodes.append(taken.get(node.name, node))
    constants = {tensor.name: tensor for part in (source, quantized) for tensor in part.graph.initializer}
    used = [name for name in dict.fromkeys(name for node in nodes for name in node.input) if name in constants]
    model = ModelProto()
    model.CopyFrom(_without_graph(source))
    graph = model.graph
    graph.name = source.graph.name
    graph.node.extend(nodes)
    graph.initializer.extend(constants[name] for name in used)
    for field in ("input", "output", "value_info"):
        getattr(graph, field).extend(getattr(source.graph, field))
    return model


def write_mixed(source: Path, quantized: Path, out: Path, low: Collection[str]) -> None:
    """The same for files."""
    save_onnx(mixed_model(onnx.load(source), onnx.load(quantized), low), out)


def kind_of(layer: str) -> str:
    """What the layer is called in every block: `blocks.*.attn.qkv`."""
    return ".".join("*" if part.isdecimal() else part for part in layer.split("."))


def _leading_to(name: str, conversions: dict[str, NodeProto]) -> Iterator[NodeProto]:
    """The conversions that make the tensor `name`, first to last."""
    if name in conversions:
        yield from _leading_to(conversions[name].input[0], conversions)
        yield conversions[name]


def _without_graph(model: ModelProto) -> ModelProto:
    bare = ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    bare.opset_import.extend(model.opset_import)
    bare.metadata_props.extend(model.metadata_props)
    return bare
