"""The paper's road on models trained here: accuracy at a budget, ablations, and what the search costs.

Long: each arm trains something and keeps its result in `results/arms/paper_road`; the same command goes on with what is
missing, and judges what is there. `--minutes 120` begins no arm after that time, `--only 'fashion7-0-*'` runs some.
`--check` evaluates the compact models that were kept, in minutes, and compares with what their arms have noted.
"""

import argparse
import fnmatch
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results import arm, exactly, finish, read_arm
from road import judge
from road.arms import ABLATIONS, ROAD, Workshop, dense_arm, evaluated, road_arm, uniform_arm, yardstick_arm
from road.dense import DEFAULT_ROOT, prepare
from road.inheritance import BUDGET, inheritance_arm
from road.models import HERE, RoadModel, road_models
from road.released import released_arm
from road.search_cost import search_cost_arm
from road.step_cost import step_cost_arm
from timm.layers import set_fused_attn

from flora.lowrank.checkpoint import load_model_folder
from flora.ranks.cost import Rank

NAME = "paper_road"
COMPACT = HERE / "compact"
SEARCHED = ("fashion7", 15)
FASTEST = "fashion7"
# Points by which half precision may move a kept model's top-1.
KEPT_POINTS = 0.05


def arms(models: dict[str, RoadModel], runs: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """All arms by name, in the order in which they are run; one whose model or images are not here is absent."""
    yield "released", released_arm
    yield "step-cost", step_cost_arm
    for model in models.values():
        run = (lambda measure: measure) if model.can_run else (lambda measure: _absent)
        for seed in range(model.seeds):
            shop = Workshop(model=model, seed=seed, runs=runs)
            name = f"{model.name}-{seed}"
            if not seed:
                yield f"{name}-dense", run(partial(dense_arm, shop))
            yield f"{name}-yardstick", run(partial(yardstick_arm, shop))
            keep = None if seed else COMPACT
            yield f"{name}-road", run(partial(road_arm, shop, ROAD, model.road_budgets, keep))
            if model.is_compared:
                for budget in model.budgets:
                    for method in ("svd", "activation"):
                        yield f"{name}-uniform-{method}-{budget}", run(partial(uniform_arm, shop, method, budget))
            if model.name == FASTEST:
                for ablation, variant in ABLATIONS.items():
                    yield f"{name}-{ablation}", run(partial(road_arm, shop, variant, (model.hardest,)))
    for seed in range(models[FASTEST].seeds):
        shop = Workshop(model=models[FASTEST], seed=seed, runs=runs)
        for method in ("activation", "svd"):
            yield (
                f"inheritance-{seed}-{method}",
                lambda shop=shop, method=method: inheritance_arm(shop, method, _ranks(shop), _yardstick(shop)),
            )
    for seed in range(models[SEARCHED[0]].seeds):
        shop = Workshop(model=models[SEARCHED[0]], seed=seed, runs=runs)
        yield f"search-cost-{seed}", partial(search_cost_arm, shop, SEARCHED[1])


def check(models: dict[str, RoadModel]) -> int:
    """Print top-1 of each kept compact model beside that of its arm; how many differ by over `KEPT_POINTS`."""
    differing = 0
    folders = sorted(COMPACT.iterdir()) if COMPACT.is_dir() else []
    if not folders:
        print(f"There are no models in {COMPACT}; the arms of the road keep theirs there.")
    for folder in folders:
        name, _, budget = folder.name.rpartition("-")
        if not models[name].has_images:
            print(f"{folder.name}: its images are not here")
            continue
        road = read_arm(NAME, f"{name}-0-road")
        if road is None:
            print(f"{folder.name}: the arm {name}-0-road has no result")
            continue
        noted = road["budgets"][budget]["top1"]
        loaded = load_model_folder(folder)
        top1 = evaluated(loaded.module, loaded, models[name])["top1"]
        differing += abs(top1 - noted) > KEPT_POINTS
        print(f"{folder.name}: {top1:.2f} %, noted {noted:.2f}", flush=True)
    return differing


def _ranks(shop: Workshop) -> dict[str, Rank]:
    """The ranks that the road of the same seed has found."""
    road = read_arm(NAME, f"{shop.model.name}-{shop.seed}-road")
    if road is None:
        raise _AbsentError
    return road["budgets"][str(BUDGET)]["ranks"]


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
    parser.add_argument(
        "--fresh", action="store_true", help="run arms again that have a result, from what lies in --runs"
    )
    parser.add_argument("--judge", action="store_true", help="run nothing, judge what is there")
    parser.add_argument("--check", action="store_true", help="evaluate the kept compact models again, and nothing else")
    parser.add_argument("--bf16", action="store_true", help="train in bf16: for processors with instructions for it")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    set_fused_attn(False)  # on a CPU, and with so few tokens, two products are faster than the fused kernel
    precision = "bf16" if options.bf16 else "no"
    models = road_models(prepare(options.root), options.cifar_train, options.cifar_test, precision=precision)
    if options.check:
        sys.exit(check(models))
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
