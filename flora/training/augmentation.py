"""Training images: timm's augmentation, drawn for each image from a seed of its own.

The seed of an image depends on the epoch and on the image's place in the data set, never on workers, processes or
batch order: whoever knows the seed can make the same crop again, and a teacher's answer can be kept for it.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from flora.errors import InputError
from flora.training.data import TimmImages
from flora.training.settings import Augmentation


class AugmentedImages(Dataset):
    """Item i of an epoch: the augmented image [C, H, W], its label, its place i and its augmentation seed."""

    def __init__(self, images: TimmImages, augmentation: Augmentation, *, seed: int = 0) -> None:
        settings = images.preprocessing
        transform = create_transform(
            **settings.model_dump(include={"input_size", "mean", "std", "interpolation"}),
            is_training=True,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            hflip=augmentation.hflip,
            auto_augment=augmentation.auto_augment,
            color_jitter=augmentation.color_jitter or 0.0,
            re_prob=augmentation.erase,
            re_mode="pixel",
        )
        self.images, self.augmentation, self.seed, self.epoch = images, augmentation, seed, 0
        self._dataset = images.dataset(transform)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int, int]:
        seed = augmentation_seed(self.seed, self.epoch, index)
        with seeded(seed):
            image, label = self._dataset[index]
        if label < 0:
            raise InputError(f"{self.images.text}: an image has no label; training needs a folder for each class.")
        return image, label, index, seed


def augmentation_seed(seed: int, epoch: int, index: int) -> int:
    """32 bits from the run's seed, the epoch and the image's place."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, Python's, NumPy's and torch's global generators start from `seed`; behind it they are as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
