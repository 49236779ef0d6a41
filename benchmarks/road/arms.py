"""The arms of the benchmark `paper_road`: each trains or evaluates one thing and returns what is to be kept of it.

What an arm makes on the way (supernets, teacher's answers) lies under `runs/road`. Each step does nothing where it is
finished and its settings are the same, so arms share what they have in common and a stopped one goes on.
A result holds one bit for each test image, right or wrong, so that any two arms can be compared image by image.
"""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from road.models import DENSE, LAYERS, RoadModel
from torch import Tensor, nn

from flora.lowrank.checkpoint import (
    LoadedModel,
    LoadedSupernet,
    load_model_folder,
    load_supernet,
    save_model,
)
from flora.lowrank.targets import trace_cost
from flora.pipeline.build import build
from flora.pipeline.compact import chosen_ranks, compact_from_supernet
from flora.pipeline.filter import FilterRequest, filter_space
from flora.pipeline.search import SearchRequest, search
from flora.pipeline.train import TrainRequest, train
from flora.ranks.evolution import SearchSettings
from flora.training.data import TimmImages
from flora.training.evaluate import logits_of

CALIBRATION_IMAGES = 512
FILTER_IMAGES = 256
SEARCH_IMAGES = 2000
SEARCH = SearchSettings.of_size(24, 6)
# Chosen on the images for rescoring: at the fine-tuning's rate, an epoch of the supernet does more harm than good.
SUPERNET_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What an arm of the road does: the road itself, or without one of its parts.

    The supernet trains for the share `supernet` of the epochs (one at least, unless it is none), what the search finds
    in it for the others.
    """

    method: str = "activation"
    filtered: bool = True
    sampling: str = "low-rank-aware"
    teacher: str = "dense"
    supernet: float = 0.25

    def epochs(self, epochs: int) -> tuple[int, int]:
        """Of so many epochs those of the supernet and those of fine-tuning."""
        first = max(1, round(self.supernet * epochs)) if self.supernet else 0
        return first, epochs - first


ROAD = Variant()
ABLATIONS = {
    "no-filter": Variant(filtered=False),
    "uniform-sampling": Variant(sampling="uniform"),
    "svd-start": Variant(method="svd"),
    "no-distillation": Variant(teacher="none"),
    "no-fine-tuning": Variant(supernet=1.0),
    "no-supernet-training": Variant(supernet=0.0),
}


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Where the arms of one model and seed keep what they make on the way."""

    model: RoadModel
    seed: int
    runs: Path

    @property
    def folder(self) -> Path:
        return self.runs / f"{self.model.name}-{self.seed}"

    @property
    def dense(self) -> Path:
        return DENSE / self.model.name

    def supernet(self, method: str) -> Path:
        """The untrained supernet; both seeds and arms share it."""
        folder = self.runs / f"{self.model.name}-{method}"
        calibration = f"{self.model.train},limit={CALIBRATION_IMAGES}" if method == "activation" else None
        build(
            load_model_folder(self.dense),
            folder,
            data=calibration,
            layers=LAYERS,
            method=method,
            space=self.model.space,
        )
        return folder

    def filtered(self, method: str) -> Path:
        folder = self.runs / f"{self.model.name}-{method}-filtered"
        request = FilterRequest(select_data=f"{self.model.select},limit={FILTER_IMAGES}")
        filter_space(self.supernet(method), folder, request)
        return folder

    def trained(self, variant: Variant) -> Path:
        source = self.filtered(variant.method) if variant.filtered else self.supernet(variant.method)
        epochs, _ = variant.epochs(self.model.training.epochs)
        if not epochs:
            return source
        folder = self.folder / "-".join([source.name, variant.sampling, variant.teacher, str(epochs)])
        changes = {"epochs": epochs, "sampling": variant.sampling, "learning_rate": SUPERNET_RATE}
        train(source, folder, self.request(variant.teacher, **changes))
        return folder

    def finetuned(self, compact: LoadedModel, folder: Path, *, epochs: int, teacher: str = "dense") -> LoadedModel:
        """`compact` after so many epochs; `folder` gets it as it was and as it is then."""
        if not epochs:
            return compact
        save_model(folder / "start", compact.module, compact.config)
        tuned = train(folder / "start", folder / "tuned", self.request(teacher, epochs=epochs))
        assert isinstance(tuned, LoadedModel)
        return tuned

    def request(self, teacher: str = "dense", **changes: Any) -> TrainRequest:
        """Training as every arm does it; the dense teacher's answers are kept for the other arms of the seed."""
        cache = self.folder / "teacher" if teacher == "dense" else None
        settings = self.model.training.model_copy(update={"seed": self.seed, **changes})
        return TrainRequest(data=self.model.train, settings=settings, teacher=teacher, teacher_cache=cache)


def dense_arm(shop: Workshop) -> dict[str, Any]:
    """The dense model as it was trained."""
    dense = load_model_folder(shop.dense)
    return evaluated(dense.module, dense, shop.model)


def yardstick_arm(shop: Workshop) -> dict[str, Any]:
    """The dense model continued for the same epochs with the same distillation."""
    out = shop.folder / "yardstick"
    continued = train(shop.dense, out, shop.request())
    return evaluated(continued.module, continued, shop.model)


def road_arm(shop: Workshop, variant: Variant, budgets: tuple[int, ...], keep: Path | None = None) -> dict[str, Any]:
    """Filter, train, search, fine-tune; each budget's model on the test images, and under `keep` in half precision."""
    trained = shop.trained(variant)
    found = shop.folder / f"{trained.name}-search"
    _, epochs = variant.epochs(shop.model.training.epochs)
    outcome = search(
        trained,
        found,
        SearchRequest(
            select_data=f"{shop.model.select},limit={SEARCH_IMAGES}",
            budgets=tuple(f"macs={budget}%" for budget in budgets),
            settings=SearchSettings.of_size(SEARCH.population, SEARCH.generations, seed=shop.seed),
        ),
    )
    supernet = load_supernet(trained)
    results = {}
    for budget in budgets:
        ranks = outcome.configs[f"macs={budget}%"]
        compact = compact_from_supernet(supernet, ranks)
        before = evaluated(compact.module, compact, shop.model)
        folder = shop.folder / f"{trained.name}-finetuned-{budget}"
        compact = shop.finetuned(compact, folder, epochs=epochs, teacher=variant.teacher)
        results[str(budget)] = evaluated(compact.module, compact, shop.model) | {
            "top1_before": before["top1"],
            "ranks": ranks.ranks,
        }
        if keep is not None:
            config = compact.config.model_copy(update={"reference": None, "image_sets": {}, "training": ()})
            save_model(keep / f"{shop.model.name}-{budget}", compact.module, config, dtype=torch.float16)
    return {"image_forwards": outcome.image_forwards, "budgets": results}


def uniform_arm(shop: Workshop, method: str, budget: int) -> dict[str, Any]:
    """Uniform ranks for the budget, fine-tuned for the same epochs with the same distillation."""
    supernet = load_supernet(shop.supernet(method))
    start = compact_from_supernet(supernet, chosen_ranks(supernet, macs=f"{budget}%"))
    before = evaluated(start.module, start, shop.model)
    folder = shop.folder / f"uniform-{method}-{budget}"
    tuned = shop.finetuned(start, folder, epochs=shop.model.training.epochs)
    return evaluated(tuned.module, tuned, shop.model) | {"top1_before": before["top1"]}


def evaluated(module: nn.Module, loaded: LoadedModel | LoadedSupernet, model: RoadModel) -> dict[str, Any]:
    """MACs, top-1 in percent, and which test images are right, as packed bits in base64."""
    settings = loaded.config.preprocessing
    logits, labels = logits_of(module, TimmImages(model.test, settings).loader(250))
    cost = trace_cost(module, (), settings.input_size)
    return {"macs": cost.dense_macs, **packed(logits.argmax(1) == labels)}


def packed(right: Tensor) -> dict[str, Any]:
    """Top-1 in percent, and which images are right (bool [images]) as a result holds it."""
    return {
        "top1": 100 * right.double().mean().item(),
        "right": base64.b64encode(np.packbits(right.numpy())).decode(),
        "images": len(right),
    }


def right_of(result: dict[str, Any]) -> np.ndarray:
    """Which test images are right, [images] bool."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(result["right"]), np.uint8))
    return bits[: result["images"]].astype(bool)
