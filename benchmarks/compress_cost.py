"""What `flora compress` costs at the size of DeiT: minutes from weights to a verified bundle, by step, and memory.

The command as a user types it, with 128 calibration and 64 evaluation images at 224 px. Weights are random and images
noise, on which time does not depend. torch takes all cores, and the latency table is of one thread, as flora measures
it unless told otherwise; the bars are for two cores. Seconds mean little on a machine that does other work.
Each arm keeps its result; with --resume the command goes on.
"""

import argparse
import fnmatch
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from overhead import write_noise_images
from results import Bar, arm, at_most, exactly, finish, read_arm

from flora.lowrank.checkpoint import load_model
from flora.lowrank.weights import save_weights

NAME = "compress_cost"
MODELS = {"deit-s": "deit_small_patch16_224", "deit-b": "deit_base_patch16_224"}
BUDGETS = {"macs": "macs=50%", "latency": "latency=0.6x"}
ARMS = ("deit-s-macs", "deit-s-latency", "deit-b-macs")
CALIBRATION_IMAGES, EVALUATION_IMAGES, CLASSES = 128, 64, 2
MINUTES = {"deit-s-macs": 6, "deit-s-latency": 10}
GIGABYTES = {"deit-b-macs": 6}
POLL_SECONDS = 0.1
# An exit code of flora: all is done, and random weights may well fail.
GATE_FAILED = 3


def measure(name: str) -> dict[str, Any]:
    """One run of the command, from an empty folder."""
    model, _, budget = name.rpartition("-")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_noise_images(folder / "calibration", CALIBRATION_IMAGES)
        for label in range(CLASSES):
            write_noise_images(folder / "evaluation" / str(label), EVALUATION_IMAGES // CLASSES, seed=1 + label)
        torch.manual_seed(0)
        dense = load_model(MODELS[model], args={"num_classes": CLASSES}, untrained=True)
        save_weights(folder / "weights.safetensors", dense.module.state_dict())
        found = observed(
            [
                *(str(Path(sys.executable).with_name("flora")), "compress", MODELS[model]),
                *("-K", f"num_classes={CLASSES}", "--checkpoint", str(folder / "weights.safetensors")),
                *("--calib-data", str(folder / "calibration"), "--eval-data", str(folder / "evaluation")),
                *("--budget", BUDGETS[budget], "--max-drop", "100"),
                *("-o", str(folder / "bundle")),
            ]
        )
        return found | {"cores": os.cpu_count()}


def observed(command: Sequence[str]) -> dict[str, Any]:
    """Seconds of a command, of its processors and of its steps, a line each on stderr; and its peak memory."""
    lines: list[tuple[float, str]] = [(time.monotonic(), "starting")]
    before = processor_seconds()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    stderr = process.stderr
    reader = threading.Thread(target=lambda: lines.extend((time.monotonic(), line.strip()) for line in stderr))
    reader.start()
    peak = 0
    while process.poll() is None:
        peak = max(peak, peak_bytes(process.pid))
        time.sleep(POLL_SECONDS)
    reader.join()
    lines.append((time.monotonic(), "ended"))
    if process.returncode not in (0, GATE_FAILED):
        sys.exit("\n".join([f"{' '.join(command)} ended with {process.returncode}:", *(text for _, text in lines)]))
    steps: dict[str, float] = {}
    for (began, step), (ended, _) in pairwise(lines):
        steps[step] = steps.get(step, 0.0) + ended - began
    return {
        "seconds": lines[-1][0] - lines[0][0],
        "processor_seconds": processor_seconds() - before,
        "steps": steps,
        "peak_bytes": peak,
    }


def processor_seconds() -> float:
    """What all processes that were waited for have taken of the processors."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def peak_bytes(process: int) -> int:
    """The most memory that a process has held so far, 0 of one that has just ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def judged(results: Mapping[str, Any]) -> tuple[list[list[str]], list[Bar]]:
    """Rows and bars of the arms that have a result."""
    rows, bars = [], []
    for name, found in results.items():
        minutes, gigabytes = found["seconds"] / 60, found["peak_bytes"] / 1e9
        busy = f"{found['processor_seconds'] / 60:.1f} of processors"
        rows.append([name, f"minutes, {found['cores']} cores", f"{minutes:.1f} ({busy})"])
        rows.append([name, "memory", f"{gigabytes:.2f} GB"])
        for step, seconds in found["steps"].items():
            rows.append([name, step, f"{seconds:.0f} s ({seconds / found['seconds']:.0%})"])
        if name in MINUTES:
            bars.append(at_most(f"{name}: minutes", minutes, MINUTES[name]))
        if name in GIGABYTES:
            bars.append(at_most(f"{name}: memory, GB", gigabytes, GIGABYTES[name]))
    return rows, bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="keep what a former run has finished")
    parser.add_argument("--only", action="append", metavar="ARM", help="arms to run, as a pattern (repeatable)")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name in ARMS:
        if options.only is None or any(fnmatch.fnmatch(name, pattern) for pattern in options.only):
            found = arm(NAME, name, partial(measure, name), fresh=not options.resume)
            print(f"{name} is measured", flush=True)
        else:
            found = read_arm(NAME, name)
        if found is not None:
            results[name] = found
    missing = [name for name in ARMS if name not in results]
    print(f"Arms without a result: {', '.join(missing) or 'none'}")
    rows, bars = judged(results)
    finish(
        NAME,
        columns=["arm", "what", "value"],
        rows=rows,
        figures=results,
        bars=[*bars, exactly("arms without a result", len(missing), 0)],
        settings={"calibration images": CALIBRATION_IMAGES, "evaluation images": EVALUATION_IMAGES},
    )


if __name__ == "__main__":
    main()
