"""Ranks without training: accuracy at a budget for uniform and allocated ranks, on 10,000 test images.

Uniform ranks of a plain SVD and of activation-aware factors, and allocated ranks; both once more compensated, which for
allocated ranks is what flora compress ships. The example's ViT on Fashion-MNIST, and with --cifar-train and
--cifar-test the benchmarks' ViT on CIFAR-10. 512 calibration images; 1,000 held-out training images to choose by.
Each arm keeps its result; with --resume the command goes on.
"""

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results import arm, at_most, finish, read_arm
from road.arms import packed, right_of
from road.dense import DEFAULT_ROOT, prepare
from road.judge import difference
from road.models import DENSE, LAYERS

from flora.lowrank.checkpoint import load_model_folder
from flora.lowrank.supernet import active_ranks
from flora.pipeline.build import build
from flora.pipeline.compact import chosen_ranks, materialize_job
from flora.pipeline.compensate import compensate_job
from flora.pipeline.sensitivity import SensitivityRequest, allocated_ranks, measure_sensitivity
from flora.training.data import TimmImages
from flora.training.evaluate import logits_of

NAME = "compress"
ROOT = Path(__file__).parent.parent
METHODS = {
    "svd": "uniform, plain SVD",
    "uniform": "uniform, activation-aware",
    "uniform-compensated": "uniform, compensated",
    "allocated": "allocated",
    "compensated": "allocated, compensated",
}
SHIPPED = "compensated"
CALIBRATION_IMAGES, PROBE_IMAGES = 512, 1000
# Allocated ranks lose so much at most on Fashion-MNIST, by budget in percent; elsewhere a part of what uniform ones do.
POINTS = {20: 0.3, 15: 1.0}
SHARE, NOTABLE_POINTS = 1 / 3, 1.0


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained model, its budgets in percent of the MACs, and its images; `held_out` is not trained on."""

    folder: Path
    budgets: tuple[int, ...]
    trained_on: str
    held_out: str
    test: str


def measure(model: Model, method: str) -> dict[str, Any]:
    """Which test images are right, by budget; the method `dense` has the budget 100 alone."""
    dense = load_model_folder(model.folder)
    test = TimmImages(model.test, dense.config.preprocessing)

    def right(module: torch.nn.Module) -> dict[str, Any]:
        logits, labels = logits_of(module, test.loader(250))
        return packed(logits.argmax(1) == labels)

    if method == "dense":
        return {"100": right(dense.module)}
    calibration = f"{model.trained_on},limit={CALIBRATION_IMAGES}"
    with tempfile.TemporaryDirectory() as scratch:
        supernet = build(
            dense,
            Path(scratch) / "supernet",
            data=None if method == "svd" else calibration,
            layers=LAYERS,
            method="svd" if method == "svd" else "activation",
            space="multiples=8",
        )
        report, selection = None, f"{model.held_out},limit={PROBE_IMAGES}"
        if method in ("allocated", SHIPPED):
            request = SensitivityRequest(select_data=selection)
            report = measure_sensitivity(supernet.folder, Path(scratch) / "sensitivity", request)
        found = {}
        for budget in model.budgets:
            ranks = (
                allocated_ranks(supernet, report, f"macs={budget}%")
                if report
                else chosen_ranks(supernet, macs=f"{budget}%")
            )
            if method.endswith("compensated"):
                compact, out = (Path(scratch) / f"{name}-{budget}" for name in ("compact", "compensated"))
                materialize_job(supernet.folder, ranks, compact, on_start=lambda done: None)
                compensate_job(compact, out, calib_data=calibration, select_data=selection, device=torch.device("cpu"))
                shipped = load_model_folder(out)
                noted = {"compensation": shipped.config.compensation.model_dump()}
                found[str(budget)] = right(shipped.module) | {"macs": ranks.macs} | noted
                continue
            with active_ranks(supernet.module, ranks.ranks):
                found[str(budget)] = right(supernet.module) | {"macs": ranks.macs, "ranks": ranks.ranks}
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="where Fashion-MNIST is or goes")
    parser.add_argument("--cifar-train", type=Path, help="CIFAR-10's training images: a tar or folder of class folders")
    parser.add_argument("--cifar-test", type=Path, help="its test images; torchvision.datasets.CIFAR10 downloads both")
    parser.add_argument("--resume", action="store_true", help="keep what a former run has finished")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fashion = f"torch/fashion_mnist,root={prepare(options.root)}"
    models = {
        "fashion": Model(
            folder=ROOT / "examples" / "fashion" / "model",
            budgets=(40, 30, 20, 15),
            trained_on=f"{fashion},split=train,except=1/12",
            held_out=f"{fashion},split=train,fold=1/12",
            test=f"{fashion},split=validation",
        ),
        "cifar": Model(
            folder=DENSE / "cifar",
            budgets=(75, 60, 50, 40),
            trained_on=f"{options.cifar_train},except=1/10",
            held_out=f"{options.cifar_train},fold=1/10",
            test=str(options.cifar_test),
        ),
    }
    rows, bars, missing = [], [], []
    for name, model in models.items():
        has_images = name == "fashion" or (options.cifar_train and options.cifar_test)
        run = partial(arm, NAME, fresh=not options.resume) if has_images else _kept
        found = {way: run(f"{name}-{way}", partial(measure, model, way)) for way in ("dense", *METHODS)}
        if None in found.values():
            missing.append(name)
            continue
        dense = right_of(found["dense"]["100"])
        for budget in model.budgets:
            lost = {way: difference([(dense, right_of(found[way][str(budget)]))]) for way in METHODS}
            rows.append(
                [
                    name,
                    f"{budget} %",
                    *(f"{-drop:+.2f} ({-high:+.2f} to {-low:+.2f})" for drop, low, high in lost.values()),
                ]
            )
            uniform, shipped = lost["uniform"][0], lost[SHIPPED][0]
            if name == "fashion" and budget in POINTS:
                bars.append(at_most(f"{name}: points lost at {budget} %", shipped, POINTS[budget]))
            if uniform > NOTABLE_POINTS:
                bar = f"{name}: loss at {budget} % over that of uniform activation-aware ranks"
                bars.append(at_most(bar, shipped / uniform, SHARE))
    if missing:
        print(f"Without images, and never measured: {', '.join(missing)}")
    finish(
        NAME,
        columns=["model", "MACs kept", *(f"{method}, points" for method in METHODS.values())],
        rows=rows,
        figures={"missing": missing},
        bars=bars,
        settings={"calibration images": CALIBRATION_IMAGES, "probe images": PROBE_IMAGES, "threads": 1},
    )


def _kept(name: str, measure: object) -> Any:
    return read_arm(NAME, name)


if __name__ == "__main__":
    main()
