"""What the tests share: one thread, no network, tiny models and a folder of labelled images."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flora.lowrank.supernet import build_supernet
from flora.lowrank.targets import find_targets, trace_cost
from flora.ranks.cost import ModelCost
from tests.samples import FAMILIES, IMAGE, random_images, tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vit_cost() -> ModelCost:
    """The cost of the two-block ViT."""
    model = tiny_model("vit")
    return trace_cost(model, find_targets(model), IMAGE)


@pytest.fixture(scope="session", params=FAMILIES)
def family_supernet(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, ModelCost]:
    """A dense model of one family, its activation-aware supernet and its cost; tests leave all three as they are."""
    dense, supernet = tiny_model(request.param), tiny_model(request.param)
    cost = trace_cost(supernet, find_targets(supernet), IMAGE)
    build_supernet(supernet, cost, batches=[random_images(4)])
    return dense, supernet, cost


@pytest.fixture
def supernet() -> nn.Module:
    """A fresh two-block ViT supernet."""
    model = tiny_model("vit")
    build_supernet(model, trace_cost(model, find_targets(model), IMAGE), batches=[random_images(4)])
    return model


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty grey images in ten class folders, each of another size and content."""
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for number in range(20):
        path = root / str(number % 10) / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (28 + number, 30), dtype=np.uint8)).save(path)
    return root
