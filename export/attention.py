"""Attention in an ONNX file: which nodes make each block, so that it can be seen whether one kernel runs them all."""

from collections.abc import Iterable
from pathlib import Path

# What lies between the two products of a block besides its softmax: scales, masks, biases, windows, precisions.
BETWEEN = ("Add", "Mul", "Div", "Where", "Reshape", "Cast", "QuantizeLinear", "DequantizeLinear", "Softmax")


def attention_blocks(path: Path) -> list[frozenset[str]]:
    """The names of product, softmax and product of every attention block in the file."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    maker = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    blocks = []
    for softmax in (node for node in graph.node if node.op_type == "Softmax"):
        scores = _first_product(softmax, lambda node: [maker[name] for name in node.input if name in maker])
        values = _first_product(softmax, lambda node: users.get(node.output[0], []))
        if scores is not None and values is not None:
            blocks.append(frozenset((scores, softmax.name, values)))
    return blocks


def _first_product(node, neighbours) -> str | None:
    """The name of the product that is nearest to `node` in one direction, through what may lie between."""
    for other in neighbours(node):
        if other.op_type == "MatMul":
            return other.name
        if other.op_type in BETWEEN and (found := _first_product(other, neighbours)) is not None:
            return found
    return None


def fused_blocks(blocks: Iterable[frozenset[str]], kernels: Iterable[frozenset[str]]) -> int:
    """How many blocks one kernel runs whole; a kernel is the nodes that it was made of."""
    made_of = list(kernels)
    return sum(any(block <= kernel for kernel in made_of) for block in blocks)
