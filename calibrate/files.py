"""How ONNX files are read and written here: what may be made smaller, and weights too large for one file beside it."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from flora.artifact import new_file
from flora.errors import InputError

# A protobuf file ends at 2 GiB; the graph itself takes some of it.
LARGEST_INLINE_BYTES = int(1.9e9)
FATAL_ONLY = 4


def check_not_quantized(path: Path) -> None:
    """Raise `InputError` for an ONNX file that holds quantize nodes already."""
    if any(node.op_type == "QuantizeLinear" for node in onnx.load(path, load_external_data=False).graph.node):
        raise InputError(f"{path} is quantized already; give the file that it was made from.")


def open_session(
    model: Path | bytes, threads: int | None, *, weights: Path | None = None, as_written: bool = False
) -> Any:
    """A session of ONNX Runtime's CPU provider; weights that lie beside a file are in the folder `weights`.

    `as_written`, each node is run by itself: no quantized product then overflows in a kernel of this processor.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Check `model` and write it; weights too large for one file go to PATH.data beside it, out of `model` as well."""
    path = Path(path)
    with new_file(path) as partial:
        if sum(tensor.ByteSize() for tensor in model.graph.initializer) > LARGEST_INLINE_BYTES:
            _save_weights(model, path.with_name(f"{path.name}.data"), partial)
        onnx.save(model, partial)
        onnx.checker.check_model(str(partial), full_check=True)


def _save_weights(model: onnx.ModelProto, weights: Path, graph: Path) -> None:
    """Write the weights, complete before they get their name, and leave the places of them in `model`."""
    with new_file(weights) as partial:
        onnx.save(model, graph, save_as_external_data=True, location=partial.name)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = weights.name
