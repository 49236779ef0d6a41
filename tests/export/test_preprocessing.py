"""`preprocess` equals timm's evaluation transform to the last bit, whatever the image and the settings."""

import itertools

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from export.preprocessing import preprocess
from flora.preprocessing import Preprocessing

SIZES = [(28, 28), (40, 31), (31, 40), (7, 5), (5, 7), (33, 33), (64, 17), (1, 9), (101, 99)]
CASES = list(
    itertools.product(
        ("center", "squash", "border"),
        ((1, 28, 28), (3, 28, 28), (3, 24, 33), (1, 33, 24)),
        (("bicubic", 0.875), ("bilinear", 0.9), ("nearest", 1.0), ("lanczos", 0.95), ("box", 0.8), ("hamming", 0.7)),
    )
)


def _image(mode: str, size: tuple[int, int], seed: int) -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    return Image.fromarray(pixels)


def _settings(crop_mode: str, input_size: tuple[int, int, int], interpolation: str, crop_pct: float) -> Preprocessing:
    grey = input_size[0] == 1
    return Preprocessing(
        input_size=input_size,
        mean=(0.2860,) if grey else (0.485, 0.456, 0.406),
        std=(0.3530,) if grey else (0.229, 0.224, 0.225),
        interpolation=interpolation,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )


@pytest.mark.parametrize(("crop_mode", "input_size", "resize"), CASES)
def test_equals_timm_to_the_last_bit(crop_mode, input_size, resize):
    settings = _settings(crop_mode, input_size, *resize)
    transform = create_transform(**settings.model_dump(), is_training=False)
    for seed, (size, mode) in enumerate(itertools.product(SIZES, ("L", "RGB", "RGBA"))):
        image = _image(mode, size, seed)
        expected = transform(image.convert(settings.image_mode)).numpy()
        got = preprocess(image, settings)
        assert got.dtype == np.float32
        assert got.shape == input_size
        assert np.array_equal(got, expected), (size, mode)


def test_a_border_of_a_very_long_image_keeps_one_pixel():
    settings = _settings("border", (3, 28, 28), "bicubic", 1.0)
    assert np.isfinite(preprocess(_image("RGB", (400, 1), 0), settings)).all()
