"""Search cost: image-forwards of our search and of the paper's settings, and how good the found subnets are.

The paper's settings: 50 configs in 21 generations, each scored by top-1 on all 5,000 selection images. Ours are the
road's, fixed before; what the statistics of the factors (a forward and a backward pass, three forwards in all) and
filtering have cost is counted. Both results are scored once on images that neither search has seen.
"""

from typing import Any

import torch
from road.arms import CALIBRATION_IMAGES, ROAD, SEARCH, SEARCH_IMAGES, Workshop, packed

from flora.lowrank.checkpoint import load_supernet
from flora.pipeline.filter import FILTER_REPORT, FilterReport
from flora.pipeline.search import starting_configs
from flora.ranks.budget import Budget
from flora.ranks.evolution import SearchSettings, SearchState, best, evolve
from flora.training.data import TimmImages
from flora.training.selection import SelectionImages, SubnetScores


def search_cost_arm(shop: Workshop, budget: int) -> dict[str, Any]:
    """Both searches of the trained supernet at one budget: what each spent, and its subnet on the other images."""
    folder = shop.trained(ROAD)
    supernet = load_supernet(folder)
    space, cost, preprocessing = supernet.config.space, supernet.config.cost, supernet.config.preprocessing
    limit = Budget.parse(f"macs={budget}%", cost)
    module = supernet.module

    def images(text: str) -> SelectionImages:
        return SelectionImages(TimmImages(text, preprocessing))

    selection, few = images(shop.model.select), images(f"{shop.model.select},limit={SEARCH_IMAGES}")
    rescored = SubnetScores(module, images(shop.model.rescore), fitness="top1")

    def result(state: SearchState) -> dict[str, Any]:
        right = torch.from_numpy(rescored([best(state).ranks], 0, len(rescored.images))[0])
        return {"image_forwards": state.image_forwards, **packed(right.bool())}

    ours = evolve(
        space,
        cost,
        limit,
        SubnetScores(module, few, fitness="loss"),
        images=len(few),
        settings=SearchSettings.of_size(SEARCH.population, SEARCH.generations, seed=shop.seed),
        initial=starting_configs(folder, space, cost, limit),
    )
    paper = evolve(
        space,
        cost,
        limit,
        SubnetScores(module, selection, fitness="top1"),
        images=len(selection),
        settings=SearchSettings(seed=shop.seed, halving=False),
    )
    filtering = FilterReport.load(folder / FILTER_REPORT).blocks
    initial = 3 * CALIBRATION_IMAGES + sum(scores.image_forwards for scores in filtering)
    return {"initial_image_forwards": initial, "ours": result(ours), "paper": result(paper)}
