"""Whether TensorRT-RTX builds engines from the Q/DQ graphs of factorized models of full size."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from quantized.files import noise_ranges, random_fp32, random_int8

from calibrate.float8 import quantize_onnx_to_float8
from calibrate.half import half_onnx
from export.engines import EngineSpec, engine_from_onnx
from flora.errors import FloraError

PRECISIONS = ("int8-fp16", "fp8")


def measure_engines(name: str) -> dict[str, Any]:
    """By precision seconds and bytes of the engine, for all GPUs that compute in it; what went wrong otherwise."""
    source = random_fp32(name, "factorized")
    found: dict[str, Any] = {}
    with TemporaryDirectory() as scratch:
        float8 = Path(scratch) / "fp8-full.onnx"
        quantize_onnx_to_float8(source, float8, noise_ranges(source))
        for precision, quantized in zip(PRECISIONS, (random_int8(name, "factorized"), float8), strict=True):
            half_onnx(quantized, path := Path(scratch) / f"{precision}.onnx", "fp16")  # as flora export builds them
            spec = EngineSpec(backend="tensorrt-rtx").fit_for(precision)
            engine = Path(scratch) / f"{precision}.engine"
            started = time.monotonic()
            try:
                engine_from_onnx(path, engine, spec)
            except FloraError as error:
                found[precision] = {"error": str(error)}
                continue
            found[precision] = {
                "compute_capabilities": spec.compute_capabilities,
                "seconds": time.monotonic() - started,
                "bytes": engine.stat().st_size,
                "onnx_bytes": path.stat().st_size,
            }
    return found
