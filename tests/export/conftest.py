"""One model, its exported file and a folder of images, shared by the tests of export/."""

from pathlib import Path

import numpy as np
import pytest
from export_samples import GREY, tiny_model
from PIL import Image
from torch import nn

from export.onnx import onnx_from_module


@pytest.fixture(scope="session")
def model() -> nn.Module:
    return tiny_model()


@pytest.fixture(scope="session")
def onnx_file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    onnx_from_module(model, path, preprocessing=GREY, class_names=[f"class {i}" for i in range(10)])
    return path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images in ten class folders."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in range(10):
        (root / str(label)).mkdir()
        for number in range(2):
            pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(root / str(label) / f"{number}.png")
    return root
