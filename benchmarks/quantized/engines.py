"""Whether TensorRT-RTX builds engines from factorized models of full size, how long it takes, how large they are."""

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from quantized.files import noise_ranges, random_fp32, random_int8

from calibrate.float8 import quantize_onnx_to_float8
from calibrate.half import half_onnx
from export.engines import EngineSpec, engine_from_onnx
from flora.errors import FloraError

PRECISIONS = ("int8-fp16", "fp8")
RTX = EngineSpec(backend="tensorrt-rtx")


def measure_engines(name: str, precisions: Sequence[str] = PRECISIONS, spec: EngineSpec = RTX) -> dict[str, Any]:
    """By precision seconds, by the clock and of processors, and bytes of the engine; what went wrong otherwise.

    It is for all GPUs that compute in the precision.
    """
    found: dict[str, Any] = {}
    with TemporaryDirectory() as scratch:
        for precision in precisions:
            path = file_for_engine(name, precision, Path(scratch))
            fitting = spec.fit_for(precision)
            engine = Path(scratch) / f"{precision}.engine"
            started, cpu_started = time.monotonic(), time.process_time()
            try:
                engine_from_onnx(path, engine, fitting)
            except FloraError as error:
                found[precision] = {"error": str(error)}
                continue
            found[precision] = {
                "compute_capabilities": fitting.compute_capabilities,
                "seconds": time.monotonic() - started,
                "cpu_seconds": time.process_time() - cpu_started,
                "bytes": engine.stat().st_size,
                "onnx_bytes": path.stat().st_size,
            }
    return found


def file_for_engine(name: str, precision: str, scratch: Path) -> Path:
    """The factorized model in a precision, as flora export hands it to an engine builder; ranges are those of noise."""
    source, path = random_fp32(name, "factorized"), scratch / f"{precision}.onnx"
    if precision == "fp32":
        return source
    if precision == "int8-fp16":
        source = random_int8(name, "factorized")
    elif precision == "fp8":
        full = scratch / "fp8-full.onnx"
        quantize_onnx_to_float8(source, full, noise_ranges(source))
        source = full
    half_onnx(source, path, "fp16")
    return path
