"""Search cost: image-forwards to a subnet at least as good as what the paper's settings find.

The paper's settings: 50 configs in 21 generations, each scored by top-1 on all 5,000 selection images. Both results are
rescored on images that neither search has seen. Ours counts what the statistics of the factors (a forward and a
backward pass, three forwards in all) and filtering have cost.
"""

from typing import Any

from road.arms import CALIBRATION_IMAGES, ROAD, SEARCH, Workshop

from flora.lowrank.checkpoint import load_supernet
from flora.pipeline.filter import FILTER_REPORT, FilterReport
from flora.pipeline.search import starting_configs
from flora.ranks.budget import Budget
from flora.ranks.evolution import SearchSettings, SearchState, best, evolve
from flora.training.data import TimmImages
from flora.training.selection import SelectionImages, SubnetScores


class _Reached(Exception):
    """A subnet as good as the paper's was found."""


def search_cost_arm(shop: Workshop, budget: int) -> dict[str, Any]:
    """Both searches of the trained supernet at one budget, and what each spent."""
    folder = shop.trained(ROAD)
    supernet = load_supernet(folder)
    space, cost, settings = supernet.config.space, supernet.config.cost, supernet.config.preprocessing
    limit = Budget.parse(f"macs={budget}%", cost)
    selection = SelectionImages(TimmImages(shop.model.select, settings))
    rescored = SubnetScores(supernet.module, SelectionImages(TimmImages(shop.model.rescore, settings)), fitness="top1")

    def top1(state: SearchState) -> float:
        return 100 * float(rescored([best(state).ranks], 0, len(rescored.images))[0].mean())

    paper = evolve(
        space,
        cost,
        limit,
        SubnetScores(supernet.module, selection, fitness="top1"),
        images=len(selection),
        settings=SearchSettings(seed=shop.seed, halving=False),
    )
    wanted = top1(paper)
    curve: list[tuple[int, float]] = []

    def note(state: SearchState) -> None:
        curve.append((state.image_forwards, top1(state)))
        if curve[-1][1] >= wanted:
            raise _Reached

    filtering = FilterReport.load(folder / FILTER_REPORT).blocks
    initial = 3 * CALIBRATION_IMAGES + sum(scores.image_forwards for scores in filtering)
    try:
        evolve(
            space,
            cost,
            limit,
            SubnetScores(supernet.module, selection, fitness="loss"),
            images=len(selection),
            settings=SearchSettings.of_size(SEARCH.population, 40, seed=shop.seed),
            initial=starting_configs(folder, space, cost, limit),
            on_generation=note,
        )
        reached = False
    except _Reached:
        reached = True
    return {
        "paper": {"image_forwards": paper.image_forwards, "rescored_top1": wanted},
        "ours": {
            "initial_image_forwards": initial,
            "image_forwards": initial + curve[-1][0],
            "rescored_top1": curve[-1][1],
            "reached": reached,
            "curve": curve,
        },
    }
