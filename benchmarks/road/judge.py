"""From the results of the arms to the table and the bars of the benchmark `paper_road`."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from results import Bar, at_least, at_most
from road.arms import ABLATIONS, right_of
from road.models import RoadModel

RESAMPLES = 1000
HEADLINE_POINTS = 0.3
SAVED_AGAINST = {"svd": 0.33, "activation": 0.15}

Row = list[str]


def judged(results: Mapping[str, Any], models: Mapping[str, RoadModel]) -> tuple[list[Row], list[Bar]]:
    """Rows and bars of everything whose arms have a result."""
    rows: list[Row] = []
    bars: list[Bar] = []
    for model in models.values():
        for part in (_headline, _against_uniform, _ablations):
            part(model, results, rows, bars)
    _inheritance(results, rows, bars)
    _search_cost(results, rows, bars)
    _step_cost(results, rows, bars)
    if released := results.get("released"):
        bars.append(at_most("released format: largest difference of logits", released["max_abs"], 1e-5))
    return rows, bars


def _seeds(results: Mapping[str, Any], model: RoadModel, *arms: str) -> list[list[Any]]:
    """For each seed that has them all, the results of `arms`."""
    found = [[results.get(f"{model.name}-{seed}-{name}") for name in arms] for seed in range(model.seeds)]
    return [line for line in found if all(line)]


def _headline(model: RoadModel, results: Mapping[str, Any], rows: list[Row], bars: list[Bar]) -> None:
    seeds = _seeds(results, model, "yardstick", "road")
    for budget in model.budgets:
        pairs = [(right_of(yardstick), right_of(road["budgets"][str(budget)])) for yardstick, road in seeds]
        if not pairs:
            return
        drop, low, high = _difference(pairs)
        top1 = fmean(100 * road.mean() for _, road in pairs)
        rows.append(
            [
                "road",
                model.name,
                f"{budget} %",
                f"{top1:.2f}",
                _points(low, high),
                f"{-drop:+.2f} yardstick",
            ]
        )
        if budget == model.headline:
            name = f"{model.name}: points lost against the yardstick at {budget} %, {len(pairs)} seed(s)"
            bars.append(at_most(name, drop, HEADLINE_POINTS))


def _against_uniform(model: RoadModel, results: Mapping[str, Any], rows: list[Row], bars: list[Bar]) -> None:
    for method, least in SAVED_AGAINST.items():
        uniform = [f"uniform-{method}-{budget}" for budget in model.budgets]
        seeds = _seeds(results, model, "yardstick", "road", *uniform)
        if not seeds:
            continue
        for place, budget in enumerate(model.budgets):
            top1 = fmean(line[2 + place]["top1"] for line in seeds)
            before = fmean(line[2 + place]["top1_before"] for line in seeds)
            rows.append([f"uniform, {method}", model.name, f"{budget} %", f"{top1:.2f}", "", f"{before:.2f} untrained"])
        saved, low, high = _saved([([*line[1]["budgets"].values(), line[0]], line[2:]) for line in seeds])
        rows.append(
            [f"MACs saved against uniform, {method}", model.name, "", f"{saved:.1%}", f"{low:.1%} to {high:.1%}", ""]
        )
        bars.append(at_least(f"{model.name}: MACs saved at equal accuracy against uniform, {method}", saved, least))


def _ablations(model: RoadModel, results: Mapping[str, Any], rows: list[Row], bars: list[Bar]) -> None:
    budget = str(model.hardest)
    for ablation in ABLATIONS:
        pairs = [
            (right_of(road["budgets"][budget]), right_of(without["budgets"][budget]))
            for road, without in _seeds(results, model, "road", ablation)
        ]
        if pairs:
            drop, low, high = _difference(pairs)
            top1 = fmean(100 * without.mean() for _, without in pairs)
            rows.append(
                [
                    ablation,
                    model.name,
                    f"{budget} %",
                    f"{top1:.2f}",
                    _points(low, high),
                    f"{-drop:+.2f} road",
                ]
            )


def _inheritance(results: Mapping[str, Any], rows: list[Row], bars: list[Bar]) -> None:
    pairs = [
        (results[f"inheritance-{seed}-activation"], results[f"inheritance-{seed}-svd"])
        for seed in range(10)
        if f"inheritance-{seed}-activation" in results and f"inheritance-{seed}-svd" in results
    ]
    if not pairs:
        return
    for method, line in zip(("activation", "svd"), zip(*pairs, strict=True), strict=True):
        text = ", ".join(f"{one['steps']}{'+' if one['censored'] else ''}" for one in line)
        rows.append([f"steps to the yardstick, {method}", "fashion7", "20 %", text, "", ""])
    ratio = sum(ours["steps"] for ours, _ in pairs) / sum(svd["steps"] for _, svd in pairs)
    bars.append(at_most("steps to the yardstick, activation-aware over plain SVD", ratio, 1 / 3))


def _search_cost(results: Mapping[str, Any], rows: list[Row], bars: list[Bar]) -> None:
    found = [result for name, result in results.items() if name.startswith("search-cost-")]
    if not found:
        return
    for one in found:
        ours, paper = one["ours"], one["paper"]
        rows.append(
            [
                "search, image-forwards",
                "fashion7",
                "15 %",
                f"{ours['image_forwards']:,.0f}",
                "",
                f"{paper['image_forwards']:,} paper's; {ours['rescored_top1']:.2f} and {paper['rescored_top1']:.2f}",
            ]
        )
    reached = all(one["ours"]["reached"] for one in found)
    ratio = fmean(one["ours"]["image_forwards"] / one["paper"]["image_forwards"] for one in found)
    bars.append(at_most("search: image-forwards over the paper's, to a subnet as good", ratio if reached else 99, 0.1))


def _step_cost(results: Mapping[str, Any], rows: list[Row], bars: list[Bar]) -> None:
    if cost := results.get("step-cost"):
        share = f"{cost['expected_macs_share']:.0%} sampled"
        rows.append(["training step, time over dense", "DeiT-S", share, f"{cost['time_ratio']:.2f}", "", ""])
        bars.append(at_most("supernet step over a dense one, time", cost["time_ratio"], 0.95))
        bars.append(at_most("supernet step over a dense one, memory", cost["memory_ratio"], 1.3))


def _points(low: float, high: float) -> str:
    """A loss between `low` and `high` points, as a change."""
    return f"{-high:+.2f} to {-low:+.2f}"


def _difference(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, float]:
    """Mean top-1 of the first less that of the second in points, with a 95 % bootstrap interval over images."""
    differences = np.stack([a.astype(float) - b for a, b in pairs]).mean(0)
    rng = np.random.default_rng(0)
    means = [100 * differences[rng.integers(len(differences), size=len(differences))].mean() for _ in range(RESAMPLES)]
    return 100 * float(differences.mean()), *(float(value) for value in np.percentile(means, [2.5, 97.5]))


def _saved(seeds: Sequence[tuple[list[Any], list[Any]]]) -> tuple[float, float, float]:
    """MACs that the road saves at the accuracy of uniform ranks, with a 95 % bootstrap interval over images.

    Each seed gives the road's results, the yardstick among them, and those of uniform ranks. What is saved is averaged
    over the uniform results and the seeds.
    """
    macs = [tuple(np.array([one["macs"] for one in part]) for part in pair) for pair in seeds]
    right = [tuple(np.stack([right_of(one) for one in part]) for part in pair) for pair in seeds]

    def saved(images: np.ndarray | slice) -> float:
        return fmean(
            1 - _macs_for(uniform[place, images].mean(), road_macs, road[:, images].mean(1)) / cost
            for (road_macs, uniform_macs), (road, uniform) in zip(macs, right, strict=True)
            for place, cost in enumerate(uniform_macs)
        )

    rng = np.random.default_rng(0)
    count = right[0][0].shape[1]
    drawn = [saved(rng.integers(count, size=count)) for _ in range(RESAMPLES)]
    return saved(slice(None)), *(float(value) for value in np.percentile(drawn, [2.5, 97.5]))


def _macs_for(accuracy: float, macs: np.ndarray, accuracies: np.ndarray) -> float:
    """MACs at which models with these `macs` reach `accuracy`, by linear interpolation.

    Below the cheapest it is that model's MACs, above the best that of the dearest: either speaks against the models.
    """
    order = np.argsort(macs)
    reached, first = np.unique(np.maximum.accumulate(accuracies[order]), return_index=True)
    return float(np.interp(accuracy, reached, macs[order][first]))
