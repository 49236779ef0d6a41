"""Any number of images runs in batches of one size, and each gets its own logits."""

import numpy as np
import pytest
from export_samples import random_images

from export.padded import PaddedRunner
from export.runners import OnnxRunner


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_each_image_gets_its_own_logits(onnx_file, count):
    images = np.asarray(random_images(count))
    with PaddedRunner(OnnxRunner(onnx_file), 3) as padded, OnnxRunner(onnx_file) as plain:
        sizes = []
        inner = padded._runner
        padded._runner = lambda batch: sizes.append(len(batch)) or inner(batch)
        np.testing.assert_allclose(padded(images), plain(images), rtol=1e-5, atol=1e-6)
        assert sizes == [3] * -(-count // 3)
        padded._runner = inner
