"""Static FP8 (E4M3), for GPUs of compute capability 8.9 and later: the INT8 file's graph with eight-bit floats.

The same products with the same ranges, FP32 around them; the largest value of a range or a channel becomes 448, the
largest of the type.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX

from calibrate.ranges import Ranges
from calibrate.static import quantize_onnx
from flora.errors import InputError
from flora.onnxfiles import save_onnx

FLOAT8 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
LARGEST, LARGEST_INT8 = 448, 127
FIRST_OPSET = 19


def quantize_onnx_to_float8(source: Path, out: Path, ranges: Ranges) -> None:
    """Write the ONNX file `out`: `source` in FP8 by these ranges.

    `InputError` where `source` is quantized already, or of an opset that has no FP8.
    """
    original = onnx.load(source)
    opset = next(entry.version for entry in original.opset_import if not entry.domain)
    if opset < FIRST_OPSET:
        raise InputError(f"{source} is of opset {opset}, FP8 needs {FIRST_OPSET}; export it at opset 20.")
    with tempfile.TemporaryDirectory() as scratch:
        quantize_onnx(source, Path(scratch) / "int8.onnx", ranges)
        model = onnx.load(Path(scratch) / "int8.onnx")
    weights = {tensor.name + TENSOR_NAME_QUANT_SUFFIX: tensor for tensor in original.graph.initializer}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for scale in {node.input[1] for node in pairs}:
        _replace(constants[scale], numpy_helper.to_array(constants[scale]) * (LARGEST_INT8 / LARGEST))
    for zero in {node.input[2] for node in pairs}:
        _replace(constants[zero], np.zeros(constants[zero].dims, FLOAT8))
    for node in pairs:
        if node.input[0] in constants:
            axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
            weight, scales = (numpy_helper.to_array(t) for t in (weights[node.input[0]], constants[node.input[1]]))
            by_channel = [-1 if i == axis else 1 for i in range(weight.ndim)]
            # Beyond 448 this type of numpy gives no number.
            codes = np.clip(weight / scales.reshape(by_channel), -LARGEST, LARGEST).astype(FLOAT8)
            _replace(constants[node.input[0]], codes)
    save_onnx(model, out)


def _replace(tensor: TensorProto, values: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
