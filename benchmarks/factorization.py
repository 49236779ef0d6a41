"""Plain SVD against activation-aware factors: the Fashion ViT, uniform ranks, no training, all 10,000 test images.

512 calibration images, evenly spaced over the training set. Bars: where ranks are low (30 and 20 % of the model's MACs)
activation-aware factors lose at most half of what plain SVD loses, and nowhere more than it beyond one standard error.
"""

import argparse
import sys
from pathlib import Path

import torch
from results import Bar, at_most, finish

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "fashion"))

from data import DEFAULT_ROOT, prepare  # noqa: E402

from flora.lowrank.checkpoint import load_model_folder  # noqa: E402
from flora.lowrank.supernet import active_ranks, build_supernet  # noqa: E402
from flora.lowrank.targets import find_targets, trace_cost  # noqa: E402
from flora.ranks.uniform import uniform_ranks_for_macs  # noqa: E402
from flora.training.data import TimmImages  # noqa: E402
from flora.training.evaluate import Accuracy, evaluate  # noqa: E402

BUDGETS = (60, 40, 30, 20, 15)
HALVED = (30, 20)
CALIBRATION_IMAGES = 512


def measure(method: str, root: Path) -> dict[int, Accuracy]:
    """Test accuracy at each budget (percent of the model's MACs); 100 is the dense model."""
    model = load_model_folder(ROOT / "examples" / "fashion" / "model")
    settings = model.config.preprocessing
    where = f"torch/fashion_mnist,root={root}"
    test = TimmImages(f"{where},split=test", settings)
    calibration = TimmImages(f"{where},split=train,limit={CALIBRATION_IMAGES}", settings)
    cost = trace_cost(model.module, find_targets(model.module), settings.input_size)
    results = {100: evaluate(model.module, test.loader(250))} if method == "svd" else {}
    build_supernet(model.module, cost, method=method, batches=calibration.images(128))
    for budget in BUDGETS:
        ranks = uniform_ranks_for_macs(cost, cost.dense_macs * budget // 100)
        with active_ranks(model.module, ranks):
            results[budget] = evaluate(model.module, test.loader(250))
        print(method, budget, results[budget].top1, file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="where Fashion-MNIST is or goes")
    root = prepare(parser.parse_args().root)
    svd, activation = measure("svd", root), measure("activation", root)
    dense = svd.pop(100)
    error = dense.top1_standard_error
    rows, bars, figures = [["100 %", f"{dense.top1:.2f}", "", ""]], [], {"dense_top1": dense.top1}
    for budget in BUDGETS:
        losses = {name: dense.top1 - result[budget].top1 for name, result in (("svd", svd), ("activation", activation))}
        figures[f"{budget}%"] = losses
        rows.append([f"{budget} %", "", f"{-losses['svd']:+.2f}", f"{-losses['activation']:+.2f}"])
        limit, rule = (
            (losses["svd"] / 2, "half of svd's loss")
            if budget in HALVED
            else (losses["svd"] + error, "svd's loss + standard error")
        )
        bars.append(at_most(f"activation's loss at {budget} %: at most {rule}", losses["activation"], limit))
    bars.append(Bar("test images", dense.images, 10_000, dense.images == 10_000))
    finish(
        "factorization",
        columns=["MACs kept", "top-1, dense", "svd, points", "activation, points"],
        rows=rows,
        figures={**figures, "standard_error": error},
        bars=bars,
        settings={"calibration images": CALIBRATION_IMAGES, "threads": torch.get_num_threads()},
    )


if __name__ == "__main__":
    main()
