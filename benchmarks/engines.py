"""Engines of TensorRT-RTX, built on the CPU from factorized models of full size: which build, how long, how large.

DeiT-S, Swin-T, ViT-B and DeiT-3-S at half of their MACs with random weights, on which neither time nor size depends, in
FP32, FP16, INT8 and FP8, each for all GPUs that compute in it and for batches of 1 to 32. No engine is run. Processor
time is over that of the FP32 engine of the same model. Each model is an arm; with --resume the command goes on. Files
that arms share lie under runs/quantization.
"""

import argparse
import math
from functools import partial

import torch
from quantized.engines import measure_engines
from quantized.files import ENGINE_MODELS, RUNS
from results import arm, exactly, finish

from export.engines import EngineSpec

NAME = "engines"
PRECISIONS = ("fp32", "fp16", "int8-fp16", "fp8")
SPEC = EngineSpec(backend="tensorrt-rtx", min_batch=1, opt_batch=8, max_batch=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="keep the models that a former run has finished")
    options = parser.parse_args()
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    figures = {
        name: arm(NAME, name, partial(measure_engines, name, PRECISIONS, SPEC), fresh=not options.resume)
        for name in ENGINE_MODELS
    }
    rows = [
        [
            f"{ENGINE_MODELS[name]}, {precision}",
            ", ".join(one["compute_capabilities"]),
            f"{one['cpu_seconds'] / engines['fp32'].get('cpu_seconds', math.nan):.2f}",
            f"{one['bytes'] / 2**20:.1f} MiB",
            f"{one['onnx_bytes'] / 2**20:.1f} MiB",
        ]
        if "error" not in one
        else [f"{ENGINE_MODELS[name]}, {precision}", "", "not built", one["error"], ""]
        for name, engines in figures.items()
        for precision, one in engines.items()
    ]
    built = sum("error" not in one for engines in figures.values() for one in engines.values())
    finish(
        NAME,
        columns=["engine", "for", "processor time, of FP32's", "engine file", "ONNX file"],
        rows=rows,
        figures=figures,
        bars=[exactly("engines built", built, len(ENGINE_MODELS) * len(PRECISIONS))],
        settings={"batches": [SPEC.min_batch, SPEC.opt_batch, SPEC.max_batch], "MACs kept": "50 %", "seed": 0},
    )


if __name__ == "__main__":
    main()
