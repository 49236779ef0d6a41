"""Inheritance: how many steps a fixed choice of ranks needs to come back to the yardstick, from either start."""

import math
from typing import Any

import torch
from road.arms import Workshop
from torch import nn

from flora.lowrank.checkpoint import load_supernet
from flora.pipeline.compact import compact_from_supernet
from flora.ranks.config import RankConfig
from flora.ranks.cost import Rank
from flora.training.augmentation import AugmentedImages
from flora.training.data import TimmImages
from flora.training.processes import accelerator
from flora.training.selection import SelectionImages
from flora.training.train import Teacher, Trainer

# The road's budget whose ranks are fixed here: low enough for the untrained loss to show, not too low to come back.
BUDGET = 20
EVERY_STEPS = 200
POINTS = 0.3
HITS = 3
MOST_EPOCHS = 8
# At the fine-tuning's rate the first steps take more from the better start than they give back.
RATE = 1e-4


class _Enough(Exception):
    """The yardstick was reached often enough in a row."""


def inheritance_arm(shop: Workshop, method: str, ranks: dict[str, Rank], yardstick: nn.Module) -> dict[str, Any]:
    """Fine-tune a model of these ranks from the start `method`; selection top-1 every 200 steps.

    `steps` is the first of three hits in a row within 0.3 points of the yardstick, or the last step without them.
    """
    supernet = load_supernet(shop.supernet(method))
    start = compact_from_supernet(supernet, RankConfig(model=supernet.config.model, ranks=ranks))
    preprocessing = start.config.preprocessing
    selection = SelectionImages(TimmImages(shop.model.select, preprocessing))
    target = _top1(yardstick, selection) - POINTS
    settings = shop.request(epochs=MOST_EPOCHS, learning_rate=RATE).settings
    curve = [(0, _top1(start.module, selection))]

    def note(step: int, loss: float) -> None:
        if step % EVERY_STEPS:
            return
        curve.append((step, _top1(trainer.trained(), selection)))
        trainer.model.train()
        if len(curve) > HITS and all(top1 >= target for _, top1 in curve[-HITS:]):
            raise _Enough

    state_file = shop.folder / f"inheritance-{method}.pt"
    state_file.unlink(missing_ok=True)  # of a run that was stopped, whose curve is lost
    trainer = Trainer(
        start.module,
        AugmentedImages(TimmImages(shop.model.train, preprocessing), settings.augmentation, seed=settings.seed),
        settings,
        accelerator=accelerator(torch.device("cpu"), settings.precision),
        state_file=state_file,
        teacher=Teacher(module=supernet.load_dense().module),
    )
    try:
        trainer.run(on_step=note)
        steps, censored = trainer.progress.step, True
    except _Enough:
        steps, censored = curve[-HITS][0], False
    state_file.unlink(missing_ok=True)
    return {"steps": steps, "censored": censored, "target": target, "curve": curve}


@torch.inference_mode()
def _top1(model: nn.Module, images: SelectionImages) -> float:
    model.eval()
    right = [(model(batch).argmax(1) == labels).float() for batch, labels in images.batches()]
    top1 = 100 * torch.cat(right).mean().item()
    assert math.isfinite(top1)
    return top1
