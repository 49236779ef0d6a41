"""Static INT8: an ONNX file with quantize and dequantize nodes around its products, for every runtime here.

Weights are symmetric with a scale for each channel, activations symmetric with one scale, biases stay as they are: what
ONNX Runtime, OpenVINO and TensorRT all take. Outputs of products are not quantized, which saves nodes and keeps more of
the accuracy.
"""

import contextlib
import io
import tempfile
from collections.abc import Collection
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static, save_tensors_data

from calibrate.ranges import METHODS, OPERATORS, Ranges
from flora.artifact import new_file
from flora.errors import InputError


def quantize_onnx(source: Path, out: Path, ranges: Ranges, *, keep: Collection[str] = ()) -> None:
    """Write the ONNX file `out`: `source` in INT8 by these ranges, but for the nodes called `keep`.

    `InputError` where `source` is quantized already.
    """
    check_not_quantized(source)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        kept, quantized = Path(scratch) / "ranges.json", Path(scratch) / "quantized.onnx"
        save_tensors_data(ranges.tensors, kept)
        quantize_static(
            str(source),
            str(quantized),
            calibration_cache_path=kept,
            calibrate_method=METHODS[ranges.method],
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATORS),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(keep),
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": list(OPERATORS),
            },
        )
        model = onnx.load(quantized)
    used = {node.domain for node in model.graph.node}
    for index in reversed(range(len(model.opset_import))):
        if model.opset_import[index].domain not in used:
            del model.opset_import[index]
    with new_file(out) as partial:
        onnx.save(model, partial)
        onnx.checker.check_model(str(partial))


def check_not_quantized(path: Path) -> None:
    """Raise `InputError` for an ONNX file that holds quantize nodes already."""
    if any(node.op_type == "QuantizeLinear" for node in onnx.load(path, load_external_data=False).graph.node):
        raise InputError(f"{path} is quantized already; give the file that it was made from.")
