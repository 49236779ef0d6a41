"""Plain SVD against activation-aware factors: the Fashion ViT, uniform ranks, no training, all 10,000 test images.

512 calibration images, evenly spaced over the training set. Bars: where ranks are low (30 and 20 % of the model's MACs)
activation-aware factors lose at most half of what plain SVD loses, and nowhere more than it beyond one standard error.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from results import arm, at_least, at_most, finish

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "fashion"))

from data import DEFAULT_ROOT, prepare  # noqa: E402

from flora.lowrank.checkpoint import load_model_folder  # noqa: E402
from flora.lowrank.supernet import active_ranks, build_supernet  # noqa: E402
from flora.lowrank.targets import find_targets, trace_cost  # noqa: E402
from flora.ranks.uniform import uniform_ranks_for_macs  # noqa: E402
from flora.training.data import TimmImages  # noqa: E402
from flora.training.evaluate import evaluate  # noqa: E402

BUDGETS = (60, 40, 30, 20, 15)
HALVED = (30, 20)
CALIBRATION_IMAGES = 512
TEST_IMAGES = 10_000
THREADS = 1


def measure(method: str, root: Path) -> dict[str, float]:
    """Top-1 on the test images by budget (percent of the model's MACs); the method `dense` has the budget 100 alone."""
    model = load_model_folder(ROOT / "examples" / "fashion" / "model")
    settings = model.config.preprocessing
    where = f"torch/fashion_mnist,root={root}"
    test = TimmImages(f"{where},split=test", settings)
    if len(test) != TEST_IMAGES:
        raise SystemExit(f"The test set has {len(test)} images instead of {TEST_IMAGES}.")
    if method == "dense":
        return {"100": evaluate(model.module, test.loader(250)).top1}
    calibration = None
    if method == "activation":
        calibration = TimmImages(f"{where},split=train,limit={CALIBRATION_IMAGES}", settings).images(128)
    cost = trace_cost(model.module, find_targets(model.module), settings.input_size)
    build_supernet(model.module, cost, method=method, batches=calibration)
    results = {}
    for budget in BUDGETS:
        ranks = uniform_ranks_for_macs(cost, cost.dense_macs * budget // 100)
        with active_ranks(model.module, ranks):
            results[str(budget)] = evaluate(model.module, test.loader(250)).top1
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="where Fashion-MNIST is or goes")
    parser.add_argument("--resume", action="store_true", help="keep the methods that a former run has finished")
    options = parser.parse_args()
    root = prepare(options.root)
    torch.set_num_threads(THREADS)
    top1 = {
        method: arm("factorization", method, lambda method=method: measure(method, root), fresh=not options.resume)
        for method in ("dense", "svd", "activation")
    }
    dense = top1["dense"]["100"]
    error = 100 * math.sqrt(dense / 100 * (1 - dense / 100) / TEST_IMAGES)
    rows, bars = [["100 %", f"{dense:.2f}", "", ""]], [at_least("top-1 of the dense example", dense, 89.0)]
    for budget in BUDGETS:
        svd, activation = (dense - top1[method][str(budget)] for method in ("svd", "activation"))
        rows.append([f"{budget} %", "", f"{-svd:+.2f}", f"{-activation:+.2f}"])
        limit, rule = (svd / 2, "half of svd's") if budget in HALVED else (svd + error, "svd's + one standard error")
        bars.append(at_most(f"loss at {budget} %, activation: {rule}", activation, limit))
    finish(
        "factorization",
        columns=["MACs kept", "top-1, dense", "svd, points", "activation, points"],
        rows=rows,
        figures={"top1": top1, "standard_error": error},
        bars=bars,
        settings={"test images": TEST_IMAGES, "calibration images": CALIBRATION_IMAGES, "threads": THREADS},
    )


if __name__ == "__main__":
    main()
