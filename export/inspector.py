"""What kernels TensorRT chose for an engine, from the JSON of its engine inspector.

Written after NVIDIA's documentation and its engine explorer; no engine of ours was ever inspected, since that needs a
GPU. The inspector knows no times.
"""

import json
import re
from typing import Any

from export.kernels import PRECISION_OF_WORD, Kernel, precision_of
from flora.errors import InputError

PRODUCT_TYPE = re.compile(r"gemm|conv(?!ert)|matrixmultiply|mha|attention", re.IGNORECASE)
# Fused layers are known by the names of their kernels only; Fc is what a generated one calls a matrix product.
PRODUCT_TACTIC = re.compile(r"gemm|gemv|fprop|fmha|_mha_|__myl_\w*?Fc(?=[A-Z_]|$)")
ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
CONVERSION = re.compile(r"reformat|cast|quantize", re.IGNORECASE)


def kernels_of_engine(inspector_json: str) -> list[Kernel]:
    """Each layer that has inputs; `InputError` for another text, or an engine that was built to tell no details."""
    try:
        layers = json.loads(inspector_json)["Layers"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"This is no description of an engine ({type(error).__name__}: {error}); give what "
            "get_engine_information(LayerInformationFormat.JSON) of TensorRT's engine inspector returns."
        ) from error
    if any(not isinstance(layer, dict) or "LayerType" not in layer for layer in layers):
        raise InputError(
            "The engine inspector gives names of layers only; build the engine with ProfilingVerbosity.DETAILED."
        )
    return [_kernel(layer) for layer in layers if layer.get("Inputs")]


def _kernel(layer: dict[str, Any]) -> Kernel:
    kind, tactic = layer.get("ParameterType", layer["LayerType"]), layer.get("TacticName", "")
    multiplies = bool(PRODUCT_TYPE.search(kind) or PRODUCT_TACTIC.search(tactic))
    return Kernel(
        precision=_precision(layer["Inputs"], tactic),
        weight=1,
        products=int(multiplies),
        converts=not multiplies and bool(CONVERSION.search(kind)),
        nodes=frozenset(ONNX_NODE.findall(layer.get("Metadata", ""))),
    )


def _precision(inputs: list[dict[str, Any]], tactic: str) -> str:
    # What tensors do not tell: FP32 that is rounded to 10 bits, and floats that are quantized inside.
    if "tf32" in tactic:
        return "tf32"
    return "int8" if "_i8i32_" in tactic else precision_of([_type(tensor) for tensor in inputs])


def _type(tensor: dict[str, Any]) -> str:
    """A word, or part of a sentence in `Format/Datatype` (up to TensorRT 10); in a field of its own from 11."""
    described = next((value for key, value in tensor.items() if key.lower().endswith("datatype")), "unknown")
    words = re.findall(r"\w+", described.lower())
    return next((word for word in words if word in PRECISION_OF_WORD), described)
