"""Static INT8: an ONNX file with quantize and dequantize nodes around its products, for every runtime here.

Weights are symmetric with a scale for each channel, activations symmetric with one scale, biases stay as they are: what
ONNX Runtime, OpenVINO and TensorRT all take. Outputs of products are not quantized, which saves nodes and keeps more of
the accuracy.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static, save_tensors_data

from calibrate.files import check_not_quantized
from calibrate.ranges import METHODS, OPERATORS, Ranges
from flora.onnxfiles import save_onnx


def quantize_onnx(source: Path, out: Path, ranges: Ranges, *, weight_bits: int = 8) -> None:
    """Write the ONNX file `out`: `source` in INT8 by these ranges.

    With 7 `weight_bits` weights use half of their codes: without instructions for products of bytes (VNNI), ONNX
    Runtime adds two products in 16 bits, which 8 bits overflow. `InputError` where `source` is quantized already.
    """
    check_not_quantized(source)
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        kept, quantized = Path(scratch) / "ranges.json", Path(scratch) / "quantized.onnx"
        save_tensors_data(ranges.tensors, kept)
        quantize_static(
            onnx.load(source),  # a path would have it write beside the file
            str(quantized),
            calibration_cache_path=kept,
            calibrate_method=METHODS[ranges.method],
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATORS),
            per_channel=True,
            reduce_range=weight_bits == 7,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
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
    save_onnx(model, out)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No prints and no advice from the quantizer, which is to optimize the graph first: the exporter has done that."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
