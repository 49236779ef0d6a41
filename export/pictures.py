"""Pictures of the images that a verification found worst, as the model sees them, beside its figures in a bundle."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from export.images import ChoosableImages
from export.verify import VerifyReport
from flora.preprocessing import Preprocessing

WORST = "worst"


def picture(image: np.ndarray, settings: Preprocessing) -> Image.Image:
    """The pixels of a preprocessed image [C, H, W]: what `export.preprocessing.normalized` made of them, undone."""
    mean, std = (np.array(values)[:, None, None] for values in (settings.mean, settings.std))
    pixels = np.clip(np.rint(255 * (image * std + mean)), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def write_pictures(
    report: VerifyReport, images: ChoosableImages, settings: Preprocessing, folder: Path
) -> VerifyReport:
    """The report with the file of each of its worst images, which are written to the bundle `folder`."""
    indices = sorted({image.index for stage in report.stages for image in stage.worst})
    for index, pixels in zip(indices, _read(images, indices), strict=True):
        (folder / WORST).mkdir(exist_ok=True)
        picture(pixels, settings).save(folder / _file(index), format="PNG", optimize=True)
    stages = [
        stage.model_copy(
            update={"worst": [image.model_copy(update={"file": _file(image.index)}) for image in stage.worst]}
        )
        for stage in report.stages
    ]
    return VerifyReport(stages=stages)


def _read(images: ChoosableImages, indices: Sequence[int]) -> list[np.ndarray]:
    if not indices:
        return []
    return [image for batch, _ in images.chosen(indices).batches(len(indices)) for image in batch]


def _file(index: int) -> str:
    return f"{WORST}/{index}.png"
