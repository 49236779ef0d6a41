"""From an image to model input with Pillow and numpy alone, equal to the last bit to timm's evaluation transform.

What serves a model should not need torch to prepare its images. The geometry repeats timm's
`create_transform(..., is_training=False)` step by step, rounding included: "center" scales the shortest edge and crops,
"squash" scales both edges to the target, "border" scales the longest edge and pads with the mean colour.
"""

import math

import numpy as np
from PIL import Image

from flora.preprocessing import Preprocessing


def preprocess(image: Image.Image, settings: Preprocessing) -> np.ndarray:
    """The normalized image, float32 [C, H, W]. It is first converted to `settings.image_mode`."""
    image = image.convert(settings.image_mode)
    height, width = settings.input_size[1:]
    scaled_size = (math.floor(height / settings.crop_pct), math.floor(width / settings.crop_pct))
    image = image.resize(
        _resized(image.size, scaled_size, settings.crop_mode), Image.Resampling[settings.interpolation.upper()]
    )
    return normalized(_crop_or_pad(image, width, height, _fill(settings)), settings)


def normalized(image: Image.Image, settings: Preprocessing) -> np.ndarray:
    """Pixels over 255, less the mean, over the standard deviation; float32 [C, H, W]."""
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (settings.mean, settings.std))
    return np.ascontiguousarray((pixels / np.float32(255) - mean) / std)


def _resized(size: tuple[int, int], scaled: tuple[int, int], crop_mode: str) -> tuple[int, int]:
    """Width and height after scaling; `size` is (width, height), `scaled` is (height, width)."""
    width, height = size
    if crop_mode == "squash":
        return scaled[1], scaled[0]
    if crop_mode == "center" and scaled[0] == scaled[1]:
        longest = int(scaled[0] * max(size) / min(size))
        return (scaled[0], longest) if width <= height else (longest, scaled[0])
    ratios = (height / scaled[0], width / scaled[1])
    ratio = max(ratios) if crop_mode == "border" else min(ratios)
    # timm's "border" rounds the short edge of a very long image to nothing and fails; one pixel remains here.
    return max(1, round(width / ratio)), max(1, round(height / ratio))


def _crop_or_pad(image: Image.Image, width: int, height: int, fill: tuple[int, ...]) -> Image.Image:
    """The middle `width` x `height` pixels, on a canvas of colour `fill` where the image is smaller."""
    canvas_size = (max(width, image.width), max(height, image.height))
    if canvas_size != image.size:
        canvas = Image.new(image.mode, canvas_size, fill)
        canvas.paste(image, ((canvas_size[0] - image.width) // 2, (canvas_size[1] - image.height) // 2))
        image = canvas
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _fill(settings: Preprocessing) -> tuple[int, ...]:
    border = settings.crop_mode == "border"
    return tuple(round(255 * value) if border else 0 for value in settings.mean)
