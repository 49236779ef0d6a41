"""How ONNX files are looked at and run here."""

from pathlib import Path
from typing import Any

import onnx

from flora.errors import InputError
from flora.onnxsessions import onnxruntime_module, session_options


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
    options = session_options(threads, as_written=as_written)
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    return onnxruntime_module().InferenceSession(model, options, providers=["CPUExecutionProvider"])
