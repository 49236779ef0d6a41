"""The pictures of a bundle show the very pixels that the model saw."""

import numpy as np
import pytest
from export_samples import GREY
from PIL import Image

from export.images import LabelledImages
from export.pictures import picture, write_pictures
from export.preprocessing import normalized
from export.tally import WorstImage
from export.verify import StageReport, VerifyReport
from flora.preprocessing import Preprocessing

COLOUR = Preprocessing(input_size=(3, 8, 6), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.mark.parametrize("settings", [GREY, COLOUR])
def test_a_picture_undoes_the_normalization(settings):
    channels, height, width = settings.input_size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze(), settings.image_mode)
    assert picture(normalized(image, settings), settings).tobytes() == image.tobytes()


def test_each_image_named_gets_one_picture(image_folder, tmp_path):
    images = LabelledImages(str(image_folder), GREY)

    def worst(*indices: int) -> list[WorstImage]:
        return [WorstImage(index=i, name="x", label=0, predicted=1, expected=0, kl=1.0) for i in indices]

    facts = {"kind": "fp16", "compared_with": "a", "provider": "p", "batch_size": 1, "images": 20}
    stages = [
        StageReport(name=name, passed=True, failures=[], worst=worst(*indices), **facts)
        for name, indices in (("b", (3, 17)), ("c", (17,)), ("d", ()))
    ]
    report = write_pictures(VerifyReport(stages=stages), images, GREY, tmp_path)
    assert [[one.file for one in stage.worst] for stage in report.stages] == [
        ["worst/3.png", "worst/17.png"],
        ["worst/17.png"],
        [],
    ]
    assert sorted(path.name for path in (tmp_path / "worst").iterdir()) == ["17.png", "3.png"]
    with Image.open(tmp_path / "worst" / "17.png") as shown:
        assert shown.tobytes() == images[17][0].tobytes()
