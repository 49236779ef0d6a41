"""The example's trained ViT as an ONNX file, and images of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from export.images import LabelledImages
from export.onnx import onnx_from_module
from export.runners import OnnxRunner, Runner
from flora.lowrank.checkpoint import load_model
from tests.worked_example import FASHION


@pytest.fixture(scope="session")
def fashion_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_model(str(FASHION / "model"))
    path = tmp_path_factory.mktemp("calibrate") / "dense.onnx"
    onnx_from_module(model.module, path, preprocessing=model.config.preprocessing, class_names=list("abcdefghij"))
    return path


def batches_of(file: str, count: int, size: int = 16) -> list[np.ndarray]:
    settings = load_model(str(FASHION / "model")).config.preprocessing
    return [images for images, _ in LabelledImages(f"{FASHION / file},limit={count}", settings).batches(size)]


def logits(path: Path, images: np.ndarray, runner: Callable[..., Runner] = OnnxRunner) -> np.ndarray:
    with runner(path, threads=1) as run:
        return run(images)


@pytest.fixture(scope="session")
def calibration() -> list[np.ndarray]:
    return batches_of("calibration.tar", 48)


@pytest.fixture(scope="session")
def test_images() -> np.ndarray:
    return np.concatenate(batches_of("test.tar", 64))
