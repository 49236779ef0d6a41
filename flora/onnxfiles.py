"""ONNX files: read with a check, written whole, weights too large for one file beside them. Needs no torch."""

import ast
from collections.abc import Callable
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from flora.artifact import new_file
from flora.errors import InputError

# Where torch's exporter notes which modules a node is of.
SCOPES = "pkg.torch.onnx.name_scopes"
FACTORS = (".down", ".up")
# A protobuf file ends at 2 GiB; the graph itself takes some of it.
LARGEST_INLINE_BYTES = int(1.9e9)


def scopes_of(node: onnx.NodeProto) -> list[str]:
    """The modules that the exporter noted for the node, the outermost first; the last is the operator's own name."""
    noted = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    return ast.literal_eval(noted)


def layer_named(module: str) -> str:
    """The layer that a module is, or is one of the two factors of."""
    return next((module.removesuffix(factor) for factor in FACTORS if module.endswith(factor)), module)


def layer_of(node: onnx.NodeProto) -> str:
    """The layer that the exporter noted for the node, else the node's own name."""
    modules = [scope for scope in scopes_of(node)[:-1] if scope]
    return layer_named(modules[-1]) if modules else node.name or node.output[0]


def fits_in_one_file(size_bytes: int) -> bool:
    """Whether a file can hold the graph and weights of so many bytes."""
    return size_bytes <= LARGEST_INLINE_BYTES


def load_onnx(path: Path) -> onnx.ModelProto:
    """Read and check an ONNX file; `InputError` when it is missing, truncated or not ONNX."""
    try:
        model = onnx.load(path)
        onnx.checker.check_model(str(path))
    except FileNotFoundError as error:
        raise InputError(f"{path} or the file of its weights does not exist; give a complete ONNX file.") from error
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise InputError(f"{path} is no complete ONNX file ({reason}); export or copy it again.") from error
    return model


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Check `model` and write it; weights too large for one file go to PATH.data beside it."""
    with new_file(path) as partial:
        if fits_in_one_file(sum(tensor.ByteSize() for tensor in model.graph.initializer)):
            onnx.save(model, partial)
        else:
            save_in_two(
                lambda weights: onnx.save(model, partial, save_as_external_data=True, location=weights), partial, path
            )
        onnx.checker.check_model(str(partial), full_check=True)


def save_in_two(save: Callable[[str], None], graph: Path, path: Path) -> None:
    """Write what will be the file `path` to `graph`, and its weights to PATH.data, complete before they get that name.

    `save` writes both; it is given the name of the file for the weights, which lies beside `graph`.
    """
    weights = path.with_name(f"{path.name}.data")
    with new_file(weights) as partial:
        save(partial.name)
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = weights.name
    onnx.save(model, graph)
