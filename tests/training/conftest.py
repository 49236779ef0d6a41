"""The images that training is tested on."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flora.ranks.cost import ModelCost
from tests.training.bench import Bench


@pytest.fixture
def bench(tmp_path: Path, image_folder: Path, vit_cost: ModelCost) -> Bench:
    return Bench(tmp_path, image_folder, vit_cost)


@pytest.fixture
def marked(tmp_path: Path, vit_cost: ModelCost) -> Bench:
    """Images that show their class: a bright square, each class at a place of its own."""
    noise = np.random.default_rng(0)
    for number in range(20):
        pixels = noise.integers(0, 60, (28, 28), dtype=np.uint8)
        row, column = divmod(number % 10, 4)
        pixels[8 * row :][:7, 7 * column :][:, :7] = 250
        path = tmp_path / "marked" / str(number % 10) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return Bench(tmp_path, tmp_path / "marked", vit_cost)
