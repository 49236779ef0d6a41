"""INT8 on top of factorization: what it costs in accuracy and saves in bytes and time, beside dense INT8 and NNCF.

The example's ViT on Fashion-MNIST, dense and factorized at 20 % of its MACs as flora compress does it without training,
calibrated on 128 held-out training images and judged on the 10,000 test images, on ONNX Runtime and OpenVINO. Time also
of DeiT-S and Swin-T at half of their MACs with random weights; one thread, all files of a model interleaved in one
process, medians of the ratios within repeats. Then the memory of calibration, and engines of TensorRT-RTX.

Each arm keeps its result; with --resume the command goes on, and `--only 'speed-*'` runs some. Speed depends on the
processor, so its arms are named by the kind of it and need one that nothing else runs on. Files that arms share lie
under runs/quantization; remove that to make them anew. The arm of NNCF needs pip install -e '.[nncf]'.
"""

import argparse
import fnmatch
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quantized.accuracy import measure_fashion, measure_nncf
from quantized.engines import measure_engines
from quantized.files import CALIBRATION_IMAGES, RANDOM_MODELS, RUNS, Fashion
from quantized.judge import judged
from quantized.memory import measure_memory
from quantized.speed import KINDS, MODELS, RUNTIMES, measure_speed, processor_kind
from results import arm, exactly, finish, read_arm
from road.dense import DEFAULT_ROOT, prepare

from calibrate.ranges import METHODS

NAME = "quantization"


def arms(fashion: Fashion) -> dict[str, Callable[[], Any]]:
    """All that can be measured here, by name."""
    kind = processor_kind()
    return {
        **{f"fashion-{runtime}": partial(measure_fashion, fashion, runtime) for runtime in RUNTIMES},
        "nncf": partial(measure_nncf, fashion),
        **{f"speed-{name}-{kind}": partial(measure_speed, name, fashion) for name in MODELS},
        **{f"memory-{method}": partial(measure_memory, method) for method in METHODS},
        **{f"engines-{name}": partial(measure_engines, name) for name in RANDOM_MODELS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="where Fashion-MNIST is or goes")
    parser.add_argument("--resume", action="store_true", help="keep what a former run has finished")
    parser.add_argument("--only", action="append", metavar="ARM", help="arms to run, as a pattern (repeatable)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    measured = arms(Fashion(root=prepare(options.root)))
    for name, measure in measured.items():
        if options.only is None or any(fnmatch.fnmatch(name, pattern) for pattern in options.only):
            arm(NAME, name, measure, fresh=not options.resume)
            print(f"{name} is measured", flush=True)
    elsewhere = [f"speed-{name}-{kind}" for name in MODELS for kind in KINDS]
    results = {name: read_arm(NAME, name) for name in dict.fromkeys([*measured, *elsewhere])}
    missing = [name for name in measured if results[name] is None]
    print(f"Arms without a result: {', '.join(missing) or 'none'}")
    rows, bars = judged({name: result for name, result in results.items() if result is not None})
    finish(
        NAME,
        columns=["arm", "what", "value", "beside"],
        rows=rows,
        figures={"missing": missing},
        bars=[*bars, exactly("arms without a result", len(missing), 0)],
        settings={"calibration images": CALIBRATION_IMAGES, "threads": 1, "processor": processor_kind()},
    )


if __name__ == "__main__":
    main()
