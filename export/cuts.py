"""Two ONNX graphs of one model, cut where both hold the same tensor, so that each piece can be run by itself.

Tensors keep their names through casts and quantization (`calibrate.half`, `static`, `mixed`, `float8`). Between the two
factors of a layer is no cut: the basis there is free (`calibrate.basis`), so that such a piece holds both products.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from flora.errors import InputError, few
from flora.onnxfiles import layer_of

PRODUCTS = ("MatMul", "Gemm")
# What a tensor is called where a piece makes it, and reads the same tensor of another file.
FOUND = "{}/found"


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One ONNX file: the maker of each tensor, the types of tensors, and the constants."""

    path: Path
    model: ModelProto
    makers: Mapping[str, NodeProto]
    types: Mapping[str, int]
    constants: Mapping[str, TensorProto]

    @property
    def input(self) -> str:
        """The name of the images."""
        return self.model.graph.input[0].name

    @property
    def outputs(self) -> list[str]:
        return [value.name for value in self.model.graph.output]

    def value_of(self, constant: str) -> np.ndarray:
        return numpy_helper.to_array(self.constants[constant], str(self.path.parent))


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A module, and the tensors at the cuts that neighbouring nodes of it make."""

    name: str
    made: tuple[str, ...]


def read_graph(path: Path) -> Graph:
    """The graph of an ONNX file, whose weights may stay beside it; `InputError` where it is none with one input."""
    path = Path(path)
    try:
        model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    except (OSError, ValueError, DecodeError, onnx.shape_inference.InferenceError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise InputError(f"{path} is no complete ONNX file ({reason}); export or copy it again.") from error
    graph = model.graph
    if len(graph.input) != 1:
        found = few(value.name for value in graph.input) or "nothing"
        raise InputError(f"{path} takes {found}; one image input is expected.")
    values = (*graph.input, *graph.value_info, *graph.output)
    return Graph(
        path=path,
        model=model,
        makers={name: node for node in graph.node for name in node.output if name},
        types={value.name: value.type.tensor_type.elem_type for value in values},
        constants={tensor.name: tensor for tensor in graph.initializer},
    )


def common_layers(reference: Graph, suspect: Graph) -> list[Layer]:
    """The cuts of both graphs by module, in the reference's order; `InputError` for graphs of different models."""
    inner = set(_between_factors(reference))
    typed = reference.types.keys() & suspect.types.keys()
    cuts = [name for name in reference.makers if name in suspect.makers and name in typed and name not in inner]
    if reference.input != suspect.input or not set(reference.outputs) <= set(cuts):
        raise InputError(
            f"{suspect.path} gives {few(suspect.outputs)} of {suspect.input}, {reference.path} gives "
            f"{few(reference.outputs)} of {reference.input}; give two files of the same model."
        )
    layers: list[Layer] = []
    for name in cuts:
        module = layer_of(reference.makers[name])
        before = layers.pop().made if layers and layers[-1].name == module else ()
        layers.append(Layer(name=module, made=(*before, name)))
    return layers


def piece(graph: Graph, wanted: Collection[str], cuts: Collection[str]) -> list[NodeProto]:
    """The nodes that make the tensors `wanted` out of those at the `cuts`, in the graph's order."""
    needed: set[int] = set()
    names = list(wanted)
    while names:
        node = graph.makers.get(names.pop())
        if node is not None and id(node) not in needed:
            needed.add(id(node))
            names += [name for name in node.input if name not in cuts]
    return [node for node in graph.model.graph.node if id(node) in needed]


def taken_by(nodes: Iterable[NodeProto], cuts: Collection[str]) -> list[str]:
    """The tensors of `cuts` that the nodes read."""
    return [name for name in dict.fromkeys(name for node in nodes for name in node.input) if name in cuts]


def as_model(
    graph: Graph,
    nodes: Sequence[NodeProto],
    takes: Iterable[str],
    gives: Iterable[str],
    *,
    renamed: Collection[str] = (),
    instead: Mapping[str, str] | None = None,
) -> ModelProto:
    """A piece as a model of its own.

    Of the tensors `renamed`, those that it makes are called as `FOUND` says; what is read `instead` of a tensor is by
    name.
    """
    model = ModelProto(ir_version=graph.model.ir_version)
    model.opset_import.extend(graph.model.opset_import)
    model.graph.name = graph.path.stem
    used = {name for node in nodes for name in node.input}
    model.graph.initializer.extend(tensor for name, tensor in graph.constants.items() if name in used)
    model.graph.node.extend(nodes)  # copies
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = (instead or {}).get(name, name)
        for i, name in enumerate(node.output):
            node.output[i] = FOUND.format(name) if name in renamed else name
    model.graph.input.extend(helper.make_tensor_value_info(name, graph.types[name], None) for name in takes)
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in gives)
    return model


def _between_factors(graph: Graph) -> Iterator[str]:
    """What stands between two products by constants and is read by nobody else."""
    uses = Counter([name for node in graph.model.graph.node for name in node.input] + graph.outputs)
    for node in graph.model.graph.node:
        first = graph.makers.get(node.input[0]) if _is_by_constant(node, graph) else None
        if first is not None and len(first.input) == 2 and _is_by_constant(first, graph) and uses[node.input[0]] == 1:
            yield node.input[0]


def _is_by_constant(node: NodeProto, graph: Graph) -> bool:
    return node.op_type in PRODUCTS and node.input[1] in graph.constants
