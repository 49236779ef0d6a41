"""From the results of the arms to the table and the bars of the benchmark `paper_road`."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from results import Bar, at_least, at_most
from road.arms import ABLATIONS, right_of
from road.inheritance import BUDGET
from road.models import RoadModel

RESAMPLES = 1000
GRID = 200
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
    dense = results.get(f"{model.name}-0-dense")
    seeds = [] if dense is None else _seeds(results, model, "yardstick", "road")
    for budget in model.budgets if seeds else ():
        found = [right_of(road["budgets"][str(budget)]) for _, road in seeds]
        beside = {
            "yardstick": difference([(right_of(yard), one) for (yard, _), one in zip(seeds, found, strict=True)]),
            "dense": difference([(right_of(dense), one) for one in found]),
        }
        top1 = fmean(100 * one.mean() for one in found)
        for what, (drop, low, high) in beside.items():
            rows.append(["road", model.name, f"{budget} %", f"{top1:.2f}", _points(low, high), f"{-drop:+.2f} {what}"])
        if budget == model.headline:
            name = f"{model.name}: points lost against the yardstick at {budget} %, {len(seeds)} seed(s)"
            bars.append(at_most(name, beside["yardstick"][0], HEADLINE_POINTS))


def _against_uniform(model: RoadModel, results: Mapping[str, Any], rows: list[Row], bars: list[Bar]) -> None:
    for method, least in SAVED_AGAINST.items():
        uniform = [f"uniform-{method}-{budget}" for budget in model.budgets]
        seeds = _seeds(results, model, "road", *uniform)
        if not seeds:
            continue
        for place, budget in enumerate(model.budgets):
            top1 = fmean(line[1 + place]["top1"] for line in seeds)
            before = fmean(line[1 + place]["top1_before"] for line in seeds)
            rows.append([f"uniform, {method}", model.name, f"{budget} %", f"{top1:.2f}", "", f"{before:.2f} untrained"])
        saved, low, high = _saved([(list(line[0]["budgets"].values()), line[1:]) for line in seeds])
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
            drop, low, high = difference(pairs)
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
        rows.append([f"steps to the yardstick, {method}", "fashion7", f"{BUDGET} %", text, "", ""])
    ratio = sum(ours["steps"] for ours, _ in pairs) / sum(svd["steps"] for _, svd in pairs)
    bars.append(at_most("steps to the yardstick, activation-aware over plain SVD", ratio, 1 / 3))


def _search_cost(results: Mapping[str, Any], rows: list[Row], bars: list[Bar]) -> None:
    found = [result for name, result in results.items() if name.startswith("search-cost-")]
    if not found:
        return
    lost, low, high = difference([(right_of(one["paper"]), right_of(one["ours"])) for one in found])
    spent = fmean(one["initial_image_forwards"] + one["ours"]["image_forwards"] for one in found)
    paper = fmean(one["paper"]["image_forwards"] for one in found)
    top1 = fmean(one["ours"]["top1"] for one in found)
    beside = f"{-lost:+.2f} the paper's settings, {paper:,.0f}"
    rows.append([f"search, {spent:,.0f} image-forwards", "fashion7", "15 %", f"{top1:.2f}", _points(low, high), beside])
    bars.append(at_most(f"search: image-forwards over the paper's, {len(found)} seed(s)", spent / paper, 0.1))
    bars.append(at_most("search: points lost against the paper's subnet, on other images", lost, 0))


def _step_cost(results: Mapping[str, Any], rows: list[Row], bars: list[Bar]) -> None:
    if cost := results.get("step-cost"):
        share = f"{cost['expected_macs_share']:.0%} sampled"
        rows.append(["training step, time over dense", "DeiT-S", share, f"{cost['time_ratio']:.2f}", "", ""])
        bars.append(at_most("supernet step over a dense one, time", cost["time_ratio"], 0.95))
        bars.append(at_most("supernet step over a dense one, memory", cost["memory_ratio"], 1.3))


def _points(low: float, high: float) -> str:
    """A loss between `low` and `high` points, as a change."""
    return f"{-high:+.2f} to {-low:+.2f}"


def difference(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, float]:
    """Mean top-1 of the first less that of the second in points, with a 95 % bootstrap interval over images."""
    differences = np.stack([a.astype(float) - b for a, b in pairs]).mean(0)
    rng = np.random.default_rng(0)
    means = [100 * differences[rng.integers(len(differences), size=len(differences))].mean() for _ in range(RESAMPLES)]
    return 100 * float(differences.mean()), *(float(value) for value in np.percentile(means, [2.5, 97.5]))


def _saved(seeds: Sequence[tuple[list[Any], list[Any]]]) -> tuple[float, float, float]:
    """MACs that the road saves at equal accuracy beside uniform ranks, with a 95 % bootstrap interval over images.

    Each seed gives the road's results and those of uniform ranks. As in Bjontegaard's rate difference, the logarithm of
    the ratio of their MACs is averaged over the accuracies that both curves reach.
    """
    macs = [tuple(np.log([one["macs"] for one in part]) for part in pair) for pair in seeds]
    right = [tuple(np.stack([right_of(one) for one in part]) for part in pair) for pair in seeds]

    def saved(images: np.ndarray | slice) -> float:
        ratios = [
            _log_ratio((road_macs, road[:, images].mean(1)), (uniform_macs, uniform[:, images].mean(1)))
            for (road_macs, uniform_macs), (road, uniform) in zip(macs, right, strict=True)
        ]
        return 1 - math.exp(fmean(ratios))

    rng = np.random.default_rng(0)
    count = right[0][0].shape[1]
    drawn = [saved(rng.integers(count, size=count)) for _ in range(RESAMPLES)]
    return saved(slice(None)), *(float(value) for value in np.percentile(drawn, [2.5, 97.5]))


Curve = tuple[np.ndarray, np.ndarray]


def _log_ratio(first: Curve, second: Curve) -> float:
    """Mean logarithm of the first curve's MACs over the second's, of curves of the logarithm of MACs and accuracy.

    Where the curves share no accuracy, the worst model of the better one is set against the best of the other.
    """
    rising = [_rising(*curve) for curve in (first, second)]
    low = max(accuracies[0] for _, accuracies in rising)
    high = min(accuracies[-1] for _, accuracies in rising)
    if high < low:
        better = rising[0][1][0] >= rising[1][1][-1]
        places = (0, -1) if better else (-1, 0)
        return float(rising[0][0][places[0]] - rising[1][0][places[1]])
    grid = np.linspace(low, high, GRID)
    ours, theirs = (np.interp(grid, accuracies, macs) for macs, accuracies in rising)
    return float(np.mean(ours - theirs))


def _rising(macs: np.ndarray, accuracies: np.ndarray) -> Curve:
    """The models that no cheaper one equals or beats, by ascending MACs."""
    order = np.argsort(macs)
    reached, first = np.unique(np.maximum.accumulate(accuracies[order]), return_index=True)
    return macs[order][first], reached
