"""The paper's road on models trained here: accuracy at a budget, ablations, and what the search costs.

Long: each arm trains something and keeps its result in `results/arms/paper_road`; the same command goes on with what is
missing, and judges what is there. `--minutes 120` begins no arm after that time, `--only 'fashion7-0-*'` runs some.
"""

import argparse
import fnmatch
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from results import arm, exactly, finish
from road import judge
from road.arms import ABLATIONS, ROAD, Workshop, dense_arm, road_arm, uniform_arm, yardstick_arm
from road.dense import DEFAULT_ROOT, prepare
from road.inheritance import inheritance_arm
from road.models import HERE, RoadModel, road_models
from road.released import released_arm
from road.search_cost import search_cost_arm
from road.step_cost import step_cost_arm

from flora.lowrank.checkpoint import load_model_folder

NAME = "paper_road"
COMPACT = HERE / "compact"
# A budget at which the untrained loss shows, for the comparison of starts.
INHERITANCE = ("fashion7", 10)
SEARCHED = ("fashion7", 15)
FASTEST = "fashion7"


def arms(models: dict[str, RoadModel], runs: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """All arms by name, in the order in which they are run."""
    yield "released", released_arm
    for model in models.values():
        for seed in range(model.seeds):
            shop = Workshop(model=model, seed=seed, runs=runs)
            name = f"{model.name}-{seed}"
            if not seed:
                yield f"{name}-dense", lambda shop=shop: dense_arm(shop)
            yield f"{name}-yardstick", lambda shop=shop: yardstick_arm(shop)
            keep = None if seed else COMPACT
            yield (
                f"{name}-road",
                lambda shop=shop, keep=keep: road_arm(shop, ROAD, shop.model.budgets, keep),
            )
            if model.is_compared:
                for budget in model.budgets:
                    for method in ("svd", "activation"):
                        yield (
                            f"{name}-uniform-{method}-{budget}",
                            lambda shop=shop, m=method, b=budget: uniform_arm(shop, m, b),
                        )
            if model.name == FASTEST:
                for ablation, variant in ABLATIONS.items():
                    yield (
                        f"{name}-{ablation}",
                        lambda shop=shop, variant=variant: road_arm(shop, variant, (shop.model.hardest,)),
                    )
    for seed in range(models[INHERITANCE[0]].seeds):
        shop = Workshop(model=models[INHERITANCE[0]], seed=seed, runs=runs)
        for method in ("activation", "svd"):
            yield (
                f"inheritance-{seed}-{method}",
                lambda shop=shop, m=method: inheritance_arm(shop, m, INHERITANCE[1], _yardstick(shop)),
            )
    shop = Workshop(model=models[SEARCHED[0]], seed=0, runs=runs)
    yield "search-cost-0", lambda: search_cost_arm(shop, SEARCHED[1])
    yield "step-cost", step_cost_arm


def _yardstick(shop: Workshop) -> torch.nn.Module:
    if not (shop.folder / "yardstick" / "config.json").is_file():
        yardstick_arm(shop)
    return load_model_folder(shop.folder / "yardstick").module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="where Fashion-MNIST is or goes")
    parser.add_argument("--cifar-train", type=Path, help="CIFAR-10's training images: a tar or folder of class folders")
    parser.add_argument("--cifar-test", type=Path, help="its test images; torchvision.datasets.CIFAR10 downloads both")
    parser.add_argument("--runs", type=Path, default=Path("runs/road"), help="where supernets lie between arms")
    parser.add_argument("--only", action="append", help="arms to run, as a pattern (repeatable)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no arm after so many minutes")
    parser.add_argument("--fresh", action="store_true", help="run arms again that have a result")
    parser.add_argument("--judge", action="store_true", help="run nothing, judge what is there")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = road_models(prepare(options.root), options.cifar_train, options.cifar_test)
    started = time.monotonic()
    results: dict[str, Any] = {}
    missing = []
    for name, measure in arms(models, options.runs):
        chosen = options.only is None or any(fnmatch.fnmatch(name, pattern) for pattern in options.only)
        in_time = time.monotonic() - started < 60 * options.minutes
        try:
            run = measure if chosen and in_time and not options.judge else _absent
            results[name] = arm(NAME, name, _timed(name, run), fresh=options.fresh and run is measure)
        except _AbsentError:
            missing.append(name)
    rows, bars = judge.judged(results, models)
    print(f"Arms without a result: {', '.join(missing) or 'none'}")
    finish(
        NAME,
        columns=["what", "model", "MACs kept", "result", "95 % interval", "beside"],
        rows=rows,
        figures={"missing": missing},
        bars=[*bars, exactly("arms without a result", len(missing), 0)],
        settings={"threads": options.threads, "epochs": {name: m.training.epochs for name, m in models.items()}},
    )


class _AbsentError(Exception):
    """An arm that has no result and is not to be run now."""


def _absent() -> dict[str, Any]:
    raise _AbsentError


def _timed(name: str, measure: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    def measured() -> dict[str, Any]:
        started = time.monotonic()
        result = measure()
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        return result

    return measured


if __name__ == "__main__":
    main()
