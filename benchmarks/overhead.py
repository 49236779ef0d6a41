"""What flora costs on top of the libraries that it stands on: export time, memory, and the start of the command line.

Times are paired and interleaved in one run, so their ratios can be compared. Memory is the peak of a process of its own
that builds (from 8 images) and materializes ViT-L, beyond what the same process held after its imports.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from results import at_most, finish

PAIRS_OF_EXPORTS = 5
PAIRS_OF_STARTS = 15
VIT_L = "vit_large_patch16_224"
CALIBRATION_IMAGES = 8
THREADS = 1


def seconds(job: Callable[[], object]) -> float:
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def paired(first: Callable[[], object], second: Callable[[], object], pairs: int) -> dict[str, float]:
    """Median times of both, and the median of the ratios first / second, measured in turns after one warm-up each."""
    first()
    second()
    times = []
    for turn in range(pairs):
        if turn % 2:
            later = seconds(second)
            times.append((seconds(first), later))
        else:
            times.append((seconds(first), seconds(second)))
    return {
        "seconds": statistics.median(a for a, _ in times),
        "baseline_seconds": statistics.median(b for _, b in times),
        "ratio": statistics.median(a / b for a, b in times),
    }


def export_overhead() -> dict[str, float]:
    """`onnx_from_module` against a bare `torch.onnx.export` of the same module, both warmed up."""
    import timm

    from export.onnx import eager_attention_of, onnx_from_module
    from flora.preprocessing import Preprocessing

    model = timm.create_model("deit_small_patch16_224", exportable=True).eval()
    settings = Preprocessing(input_size=(3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
    example = torch.zeros(2, 3, 224, 224)
    batch = torch.export.Dim("batch", min=1, max=64)
    with tempfile.TemporaryDirectory() as folder:
        ours, bare = Path(folder) / "ours.onnx", Path(folder) / "bare.onnx"

        def export_bare() -> None:
            torch.onnx.export(
                model,
                (example,),
                bare,
                dynamo=True,
                dynamic_shapes=({0: batch},),
                opset_version=20,
                optimize=True,
                external_data=False,
                verbose=False,
            )

        with eager_attention_of(model):
            return paired(lambda: onnx_from_module(model, ours, preprocessing=settings), export_bare, PAIRS_OF_EXPORTS)


def memory_of_vit_l() -> dict[str, float]:
    """Peak resident memory of `flora build` and `flora materialize` on ViT-L, over the size of its weights."""
    output = subprocess.run(
        [sys.executable, __file__, "--memory-child"], check=True, capture_output=True, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def memory_child() -> None:
    import timm
    import torchvision  # noqa: F401 (part of the baseline: timm's data needs it)

    from flora.lowrank.checkpoint import LoadedModel, ModelConfig
    from flora.pipeline.build import build
    from flora.pipeline.compact import chosen_ranks, compact_from_supernet
    from flora.preprocessing import Preprocessing

    torch.manual_seed(0)
    baseline = memory_now("VmRSS")
    module = timm.create_model(VIT_L).eval()
    weights = sum(parameter.nbytes for parameter in module.parameters())
    settings = Preprocessing(input_size=(3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images" / "all"
        write_noise_images(images, CALIBRATION_IMAGES)
        model = LoadedModel(module=module, config=ModelConfig(model=VIT_L, preprocessing=settings))
        supernet = build(model, Path(folder) / "supernet", data=str(images.parent), batch_size=CALIBRATION_IMAGES)
        compact_from_supernet(supernet, chosen_ranks(supernet, macs="50%"))
    peak = memory_now("VmHWM") - baseline
    print(json.dumps({"weights_bytes": weights, "peak_bytes": peak, "ratio": peak / weights}))


def memory_now(field: str) -> int:
    """Bytes of this process: VmRSS resident now, VmHWM its peak (unlike getrusage's, it starts anew with a program)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("This benchmark reads /proc/self/status, which Linux has.")


def write_noise_images(folder: Path, count: int, *, seed: int = 0) -> None:
    """Files of 224 px; other images for another seed."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for index in range(count):
        pixels = draw.integers(0, 256, (224, 224, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def start_of_the_command_line() -> dict[str, float]:
    """`flora --help` against `python -c "import click"`."""
    flora = Path(sys.executable).with_name("flora")

    def run(*command: str | Path) -> Callable[[], object]:
        return lambda: subprocess.run(command, check=True, capture_output=True)

    return paired(run(flora, "--help"), run(sys.executable, "-c", "import click"), PAIRS_OF_STARTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-child", action="store_true", help=argparse.SUPPRESS)
    torch.set_num_threads(THREADS)
    if parser.parse_args().memory_child:
        memory_child()
        return
    figures = {
        "help": start_of_the_command_line(),
        "export": export_overhead(),
        "memory": memory_of_vit_l(),
    }
    finish(
        "overhead",
        columns=["what", "against", "ratio"],
        rows=[
            ["flora --help", 'python -c "import click"', f"{figures['help']['ratio']:.2f}"],
            ["onnx_from_module, DeiT-S", "torch.onnx.export", f"{figures['export']['ratio']:.2f}"],
            ["peak memory of build and materialize, ViT-L", "its weights", f"{figures['memory']['ratio']:.2f}"],
        ],
        figures=figures,
        bars=[
            at_most("flora --help over import click", figures["help"]["ratio"], 3.0),
            at_most("onnx_from_module over torch.onnx.export", figures["export"]["ratio"], 1.3),
            at_most("memory of build and materialize over the weights, ViT-L", figures["memory"]["ratio"], 4.0),
        ],
        settings={
            "pairs of exports": PAIRS_OF_EXPORTS,
            "pairs of starts": PAIRS_OF_STARTS,
            "calibration images": CALIBRATION_IMAGES,
            "threads": THREADS,
        },
    )


if __name__ == "__main__":
    main()
