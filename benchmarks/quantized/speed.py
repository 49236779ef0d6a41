"""Time in INT8: all files of a model on both runtimes, interleaved in one process, on one thread.

What a processor does with INT8 depends on its instructions for products of bytes (VNNI), so an arm is of one kind of
processor, and says where in each file the time went.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from quantized.files import FORMS, SIZE, Fashion, noise, random_fp32, random_int8

from export.attestation import attest
from export.latency import interleaved_ms
from export.runtimes import open_runner

RUNTIMES = ("ort-cpu", "openvino")
MODELS = ("fashion", "deit-s", "swin-t")
KINDS = ("vnni", "avx2")
VNNI = {"avx512_vnni", "avx_vnni"}
FASHION_REPEATS = {1: 201, 8: 101, 32: 51}
REPEATS = {8: 31}
WARMUP = 3

# By runtime and what is run there, such as `factorized int8`, an ONNX file or one of OpenVINO.
Files = Mapping[tuple[str, str], Path]


def processor_kind() -> str:
    """Whether this processor has instructions for products of bytes."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line.partition(":")[2].split() for line in lines if line.startswith("flags"))
    return "vnni" if VNNI & set(flags) else "avx2"


def measure_speed(name: str, fashion: Fashion) -> dict[str, Any]:
    """Milliseconds of each file in each repeat, by batch, and the attestation of each INT8 file."""
    if name == "fashion":
        files, size, repeats = _fashion_files(fashion), fashion.preprocessing.input_size, FASHION_REPEATS
    else:
        files, size, repeats = _random_files(name), SIZE, REPEATS
    batches = {str(batch): _times(files, batch, size, count) for batch, count in repeats.items()}
    attested = {
        f"{runtime}, {what}": attest(path, runtime, noise(max(repeats), size), threads=1).model_dump(mode="json")
        for (runtime, what), path in files.items()
        if "int8" in what
    }
    return {"times_ms": batches, "attestations": attested}


def _fashion_files(fashion: Fashion) -> Files:
    files = {(runtime, f"{form} fp32"): fashion.fp32(form) for runtime in RUNTIMES for form in FORMS}
    files |= {(runtime, f"{form} int8"): fashion.int8(form, runtime)[0] for runtime in RUNTIMES for form in FORMS}
    return files | {("openvino", "factorized int8 by NNCF"): fashion.nncf()}


def _random_files(name: str) -> Files:
    files = {(runtime, f"{form} fp32"): random_fp32(name, form) for runtime in RUNTIMES for form in FORMS}
    return files | {(runtime, f"{form} int8"): random_int8(name, form) for runtime in RUNTIMES for form in FORMS}


def _times(files: Files, batch: int, size: tuple[int, int, int], repeats: int) -> dict[str, list[float]]:
    images = noise(batch, size)
    with ExitStack() as opened:
        calls = [
            opened.enter_context(open_runner(runtime, path, threads=1)).bind(images)
            for (runtime, _), path in files.items()
        ]
        draw = np.random.default_rng(0)
        interleaved_ms(calls, repeats=WARMUP, draw=draw)
        times = interleaved_ms(calls, repeats=repeats, draw=draw)
    return {
        f"{runtime}, {what}": [round(float(ms), 4) for ms in line]
        for (runtime, what), line in zip(files, times, strict=True)
    }
