"""`flora bench` judged: runs of the whole command agree, and they agree with a bare loop around the same sessions.

DeiT-S at 224 px with random weights, on which time does not depend, at half of its MACs by uniform ranks, and the ViT
of examples/fashion at a fifth, both exported by `flora export`; one thread, ONNX Runtime and OpenVINO, from batch 8.

The bare loop knows nothing of flora: it opens a session and times the same call over and over. A round, at one batch,
is such a loop for each session, the command, and the loops again; a round's quotient is flora's median over the mean of
the two around it, and what is judged is the median quotient of the rounds: a device that drifts from minute to minute
must not decide. Ratios are judged between every two rounds. Absolute medians of different rounds are shown, not judged.
Each round is an arm and keeps its result; with --resume the command goes on. Needs a processor that nothing else runs
on.
"""

import argparse
import fnmatch
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
from overhead import write_noise_images
from results import Bar, arm, at_most, exactly, finish, read_arm

from flora.lowrank.checkpoint import load_model, save_model
from flora.pipeline.bench_report import BenchReport

NAME = "bench"
ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "bench"
FASHION = ROOT / "examples" / "fashion"
# Batches, and the seconds that each is timed at most.
MODELS = {"deit-s": ((8, 16), 150), "fashion": ((8, 32), 40)}
ROUNDS = 3
FILES = {"dense": "onnx/dense-fp32.onnx", "factorized": "onnx/model-fp32.onnx"}
RUNTIMES = {"ort-cpu": "ONNX Runtime", "openvino": "OpenVINO"}
ALLOWED = 0.05
CLASSES = 2
# Of a bare loop: runs that are not counted, and the fewest and the least seconds of those that are.
WARM_UP, LEAST_RUNS, LEAST_SECONDS = 5, 15, 5.0


def bundle_of(name: str) -> Path:
    """The model's bundle, exported once."""
    bundle = RUNS / name
    if bundle.is_dir():
        return bundle
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if name == "fashion":
            model, build, share = FASHION / "model", ["--data", f"{FASHION / 'calibration.tar'}"], "20%"
            images = FASHION / "test.tar"
        else:
            model, build, share = folder / "dense", ["--method", "svd"], "50%"
            images = folder / "images"
            for label in range(CLASSES):
                write_noise_images(images / str(label), 8, seed=label)
            torch.manual_seed(0)
            dense = load_model("deit_small_patch16_224", args={"num_classes": CLASSES}, untrained=True)
            save_model(model, dense.module, dense.config)
        layers = "qkv,proj,fc1,fc2"
        flora("build", model, *build, "--layers", layers, "-o", folder / "supernet")
        flora("materialize", folder / "supernet", "--uniform-macs", share, "-o", folder / "compact")
        timing = ("--threads", 1, "--repeats", 1)
        flora("export", folder / "compact", "--eval-data", images, "--max-drop", 100, *timing, "-o", bundle)
    return bundle


def flora(*args: object) -> str:
    """What the command prints; it may end with a failed gate, which random weights and a busy device bring about."""
    command = [str(Path(sys.executable).with_name("flora")), *map(str, args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 3):
        sys.exit(f"{' '.join(command)} ended with exit code {done.returncode}")
    return done.stdout


def bare_ms(runtime: str, path: Path, images: np.ndarray) -> float:
    """The median of a loop that does nothing else."""
    call = _bare_call(runtime, path, images)
    for _ in range(WARM_UP):
        call()
    times: list[float] = []
    while len(times) < LEAST_RUNS or sum(times) < LEAST_SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def _bare_call(runtime: str, path: Path, images: np.ndarray) -> Callable[[], object]:
    if runtime == "openvino":
        config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()
        return lambda: request.infer([images], share_inputs=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images}
    return lambda: session.run(None, inputs)


def measure(name: str, batch: int) -> dict[str, Any]:
    """One round: by session the medians of both loops, and flora's report between them."""
    bundle, (_, seconds) = bundle_of(name), MODELS[name]
    size = (1, 28, 28) if name == "fashion" else (3, 224, 224)
    images = np.random.default_rng(0).standard_normal((batch, *size)).astype(np.float32)

    def bare() -> dict[str, float]:
        return {
            f"{what}, {label}": bare_ms(runtime, bundle / file, images)
            for what, file in FILES.items()
            for runtime, label in RUNTIMES.items()
        }

    before = bare()
    timing = ("--batch", batch, "--seconds", seconds, "--threads", 1, "--no-memory")
    report = flora("bench", bundle, "--runtime", "openvino", *timing, "--json")
    return {"before": before, "report": BenchReport.parse(report, origin=name).model_dump(mode="json"), "after": bare()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="keep what a former run has finished")
    parser.add_argument("--only", action="append", metavar="ARM", help="rounds to measure, as a pattern (repeatable)")
    options = parser.parse_args()
    arms = {
        f"{name}-b{batch}-{number}": partial(measure, name, batch)
        for name, (batches, _) in MODELS.items()
        for number in range(1, ROUNDS + 1)
        for batch in batches
    }
    for key, what in arms.items():
        if options.only is None or any(fnmatch.fnmatch(key, pattern) for pattern in options.only):
            arm(NAME, key, what, fresh=not options.resume)
            print(f"{key} is measured", flush=True)
    results = {key: read_arm(NAME, key) for key in arms}
    missing = [key for key, result in results.items() if result is None]
    rows: list[list[str]] = []
    bars: list[Bar] = [exactly("rounds without a result", len(missing), 0)]
    for name, (batches, _) in MODELS.items():
        for batch in batches:
            rounds = [result for key, result in results.items() if result and key.startswith(f"{name}-b{batch}-")]
            if rounds:
                judge(f"{name}, batch {batch}", rounds, rows, bars)
    finish(
        NAME,
        columns=["model", "what", "flora, ms by round", "bare, ms by round", "flora over bare", "ratio by round"],
        rows=rows,
        figures={"missing": missing, "rounds": results},
        bars=bars,
        settings={"threads": 1, "rounds": ROUNDS, "batches and seconds": str(MODELS)},
    )


def judge(name: str, rounds: list[Mapping[str, Any]], rows: list[list[str]], bars: list[Bar]) -> None:
    """A row for each session, and the worst of them as bars."""
    figures = [_by_session(BenchReport.model_validate(one["report"])) for one in rounds]
    off_bare, apart = [], []
    for what in figures[0]:
        medians, ratios = ([one[what][field] for one in figures] for field in (0, 1))
        bare = [(one["before"][what] + one["after"][what]) / 2 for one in rounds]
        quotient = float(np.median(np.divide(medians, bare)))
        off_bare.append(abs(quotient - 1))
        apart += [abs(one / other - 1) for one, other in combinations(ratios, 2)]
        shown = (", ".join(f"{value:.4g}" for value in values) for values in (medians, bare))
        rows.append([name, what, *shown, f"{quotient:.3f}", ", ".join(f"{ratio:.3f}" for ratio in ratios)])
    bars.append(at_most(f"{name}: medians, flora against a bare loop, the worst", max(off_bare), ALLOWED))
    if apart:
        bars.append(at_most(f"{name}: ratios, one round against another, the worst", max(apart), ALLOWED))


def _by_session(report: BenchReport) -> dict[str, tuple[float, float]]:
    """Median and ratio of each row."""
    return {row.name: (row.latency.median_ms, row.latency.ratio) for row in report.rows}


if __name__ == "__main__":
    main()
