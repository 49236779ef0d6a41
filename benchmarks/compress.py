"""Accuracy at a budget of MACs without training, and after one epoch of it, on 10,000 test images.

Uniform ranks of a plain SVD and of activation-aware factors, and allocated ranks; both once more compensated, which for
allocated ranks is what flora compress ships. Beside them structural pruning by Torch-Pruning. Four of them also after
the same epoch, in which they learn from the dense model. The example's ViT on Fashion-MNIST, and with --cifar-train and
--cifar-test the benchmarks' ViT on CIFAR-10. 512 calibration images; 1,000 held-out training images to choose by.

Each arm keeps its result; with --resume the command goes on, and `--only 'fashion-pruned*'` runs some. What trained
arms make lies under --runs, where they share it and a stopped one goes on; remove that to make it anew.
"""

import argparse
import fnmatch
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results import Bar, arm, at_most, exactly, finish, read_arm
from road.arms import packed, right_of
from road.dense import DEFAULT_ROOT, prepare
from road.judge import difference
from road.models import DENSE, LAYERS
from road.pruning import pruned_to
from timm.layers import set_fused_attn

from flora.lowrank.checkpoint import LoadedModel, load_model_folder, save_model
from flora.lowrank.targets import trace_cost
from flora.pipeline.build import build
from flora.pipeline.compact import chosen_ranks, compact_from_supernet, materialize_job
from flora.pipeline.compensate import compensate_job
from flora.pipeline.sensitivity import SensitivityRequest, allocated_ranks, measure_sensitivity
from flora.pipeline.train import TrainRequest, train
from flora.ranks.budget import macs_budget
from flora.training.data import TimmImages
from flora.training.evaluate import logits_of
from flora.training.settings import training_settings

NAME = "compress"
ROOT = Path(__file__).parent.parent
METHODS = {
    "svd": "uniform, plain SVD",
    "uniform": "uniform, activation-aware",
    "uniform-compensated": "uniform, compensated",
    "allocated": "allocated",
    "compensated": "allocated, compensated",
    "pruned": "pruned",
}
SHIPPED = "compensated"
TUNED = ("svd", "uniform", SHIPPED, "pruned")
CALIBRATION_IMAGES, PROBE_IMAGES = 512, 1000
EPOCH = {"epochs": 1, "batch_size": 128, "learning_rate": 5e-4, "warmup_epochs": 0.1, "seed": 0}
# Allocated ranks lose so much at most on Fashion-MNIST, by budget in percent; elsewhere a part of what uniform ones do.
POINTS = {20: 0.3, 15: 1.0}
SHARE, NOTABLE_POINTS = 1 / 3, 1.0

# By method, points of top-1 that are lost, with a 95 % interval.
Losses = dict[str, tuple[float, float, float]]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained model, its budgets in percent of the MACs, and its images; `held_out` is not trained on."""

    name: str
    folder: Path
    budgets: tuple[int, ...]
    trained_on: str
    held_out: str
    test: str
    has_images: bool = True

    def evaluated(self, loaded: LoadedModel) -> dict[str, Any]:
        """MACs, and which test images are right."""
        settings = loaded.config.preprocessing
        logits, labels = logits_of(loaded.module, TimmImages(self.test, settings).loader(250))
        cost = trace_cost(loaded.module, (), settings.input_size)
        return packed(logits.argmax(1) == labels) | {"macs": cost.dense_macs}


def measure_dense(model: Model) -> dict[str, Any]:
    """The dense model, as the budget 100."""
    return {"100": model.evaluated(load_model_folder(model.folder))}


def measure(model: Model, method: str) -> dict[str, Any]:
    """Each budget's model, untrained."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for budget in model.budgets:
            loaded = compact(model, method, budget, Path(scratch))
            noted = loaded.config.model_dump(include={"args", "ranks", "compensation"})
            found[str(budget)] = model.evaluated(loaded) | noted
    return found


def measure_tuned(model: Model, method: str, budget: int, runs: Path, precision: str) -> dict[str, Any]:
    """One budget's model after an epoch in which it learns from the dense one, whose answers serve all arms."""
    shared = runs / model.name
    out = shared / f"{method}-{budget}"
    start = compact(model, method, budget, shared)
    save_model(out / "start", start.module, start.config)
    request = TrainRequest(
        data=model.trained_on,
        settings=training_settings(**EPOCH, precision=precision),
        teacher=str(model.folder),
        teacher_cache=shared / "teacher",
    )
    set_fused_attn(False)  # on a CPU, and with so few tokens, two products are faster than the fused kernel
    try:
        tuned = train(out / "start", out / "tuned", request)
    finally:
        set_fused_attn(True)
    assert isinstance(tuned, LoadedModel)
    return model.evaluated(tuned) | {"precision": precision}


def compact(model: Model, method: str, budget: int, folder: Path) -> LoadedModel:
    """The untrained model within a budget; what it comes from lies in `folder` and serves other budgets."""
    dense = load_model_folder(model.folder)
    if method == "pruned":
        cost = trace_cost(dense.module, (), dense.config.preprocessing.input_size)
        return pruned_to(dense, macs_budget(f"{budget}%", cost))
    calibration, selection = f"{model.trained_on},limit={CALIBRATION_IMAGES}", f"{model.held_out},limit={PROBE_IMAGES}"
    factors = "svd" if method == "svd" else "activation"
    supernet = build(
        dense,
        folder / factors,
        data=None if method == "svd" else calibration,
        layers=LAYERS,
        method=factors,
        space="multiples=8",
    )
    if method in ("allocated", SHIPPED):
        request = SensitivityRequest(select_data=selection)
        report = measure_sensitivity(supernet.folder, folder / "sensitivity", request)
        ranks = allocated_ranks(supernet, report, f"macs={budget}%")
    else:
        ranks = chosen_ranks(supernet, macs=f"{budget}%")
    if not method.endswith("compensated"):
        return compact_from_supernet(supernet, ranks)
    plain, fitted = (folder / f"{method}-{budget}-{step}" for step in ("plain", "fitted"))
    materialize_job(supernet.folder, ranks, plain, on_start=lambda done: None)
    compensate_job(plain, fitted, calib_data=calibration, select_data=selection, device=torch.device("cpu"))
    return load_model_folder(fitted)


def arms(model: Model, runs: Path, precision: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The arms of a model by name, those that train last."""
    yield f"{model.name}-dense", partial(measure_dense, model)
    for method in METHODS:
        yield f"{model.name}-{method}", partial(measure, model, method)
    for budget in model.budgets:
        for method in TUNED:
            yield (
                f"{model.name}-{method}-{budget}-tuned",
                partial(measure_tuned, model, method, budget, runs, precision),
            )


def losses(results: Mapping[str, Any], model: Model, budget: int, *, tuned: bool) -> Losses:
    """What each method loses against the dense model, of those that have a result."""
    dense, lost = results[f"{model.name}-dense"], {}
    for method in METHODS:
        name = f"{model.name}-{method}"
        found = results.get(f"{name}-{budget}-tuned") if tuned else (results[name] or {}).get(str(budget))
        if dense and found:
            lost[method] = difference([(right_of(dense["100"]), right_of(found))])
    return lost


def row(model: Model, budget: int, lost: Losses, *, tuned: bool) -> list[str]:
    """A line of the table; methods that are not trained have no figure, those without a result a dash."""
    cells = []
    for method in METHODS:
        drop, low, high = lost.get(method, (0.0, 0.0, 0.0))
        text = f"{-drop:+.2f} ({-high:+.2f} to {-low:+.2f})" if method in lost else "-"
        cells.append("" if tuned and method not in TUNED else text)
    return [model.name, f"{budget} %", "1" if tuned else "0", *cells]


def bars_of(model: Model, budget: int, lost: Losses) -> Iterator[Bar]:
    """What flora ships, untrained, against limits and against uniform ranks."""
    if SHIPPED not in lost or "uniform" not in lost:
        return
    uniform, shipped = lost["uniform"][0], lost[SHIPPED][0]
    if model.name == "fashion" and budget in POINTS:
        yield at_most(f"{model.name}: points lost at {budget} %", shipped, POINTS[budget])
    if uniform > NOTABLE_POINTS:
        bar = f"{model.name}: loss at {budget} % over that of uniform activation-aware ranks"
        yield at_most(bar, shipped / uniform, SHARE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="where Fashion-MNIST is or goes")
    parser.add_argument("--cifar-train", type=Path, help="CIFAR-10's training images: a tar or folder of class folders")
    parser.add_argument("--cifar-test", type=Path, help="its test images; torchvision.datasets.CIFAR10 downloads both")
    parser.add_argument("--runs", type=Path, default=Path("runs/compress"), help="where trained arms lie")
    parser.add_argument("--resume", action="store_true", help="keep what a former run has finished")
    parser.add_argument("--only", action="append", metavar="ARM", help="arms to run, as a pattern (repeatable)")
    parser.add_argument("--bf16", action="store_true", help="train in bf16: for processors with instructions for it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fashion = f"torch/fashion_mnist,root={prepare(options.root)}"
    models = (
        Model(
            name="fashion",
            folder=ROOT / "examples" / "fashion" / "model",
            budgets=(40, 30, 20, 15),
            trained_on=f"{fashion},split=train,except=1/12",
            held_out=f"{fashion},split=train,fold=1/12",
            test=f"{fashion},split=validation",
        ),
        Model(
            name="cifar",
            folder=DENSE / "cifar",
            budgets=(75, 60, 50, 40),
            trained_on=f"{options.cifar_train},except=1/10",
            held_out=f"{options.cifar_train},fold=1/10",
            test=str(options.cifar_test),
            has_images=options.cifar_train is not None and options.cifar_test is not None,
        ),
    )
    results: dict[str, Any] = {}
    rows: list[list[str]] = []
    bars: list[Bar] = []
    for model in models:
        for name, measure_arm in arms(model, options.runs, "bf16" if options.bf16 else "no"):
            chosen = options.only is None or any(fnmatch.fnmatch(name, pattern) for pattern in options.only)
            if chosen and model.has_images:
                results[name] = arm(NAME, name, measure_arm, fresh=not options.resume)
                print(f"{name} is measured", flush=True)
            else:
                results[name] = read_arm(NAME, name)
        for tuned in (False, True):
            for budget in model.budgets:
                lost = losses(results, model, budget, tuned=tuned)
                rows.append(row(model, budget, lost, tuned=tuned))
                bars.extend([] if tuned else bars_of(model, budget, lost))
    missing = [name for name, result in results.items() if result is None]
    print(f"Arms without a result: {', '.join(missing) or 'none'}")
    finish(
        NAME,
        columns=["model", "MACs kept", "epochs", *(f"{method}, points" for method in METHODS.values())],
        rows=rows,
        figures={"missing": missing},
        bars=[*bars, exactly("arms without a result", len(missing), 0)],
        settings={"calibration images": CALIBRATION_IMAGES, "probe images": PROBE_IMAGES, "threads": 1},
    )


if __name__ == "__main__":
    main()
