"""An image's augmentation depends on the run's seed, the epoch and the image's place, and on nothing else."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from flora.errors import InputError
from flora.training.augmentation import AugmentedImages, augmentation_seed, seeded
from flora.training.data import TimmImages
from flora.training.settings import AUGMENTATIONS
from tests.samples import GREY


@pytest.fixture
def images(image_folder: Path) -> AugmentedImages:
    return AugmentedImages(TimmImages(str(image_folder), GREY), AUGMENTATIONS["light"], seed=3)


def test_an_image_is_the_same_in_any_order_and_from_any_worker(images: AugmentedImages):
    alone = [images[i][0] for i in (5, 2, 9)]
    for workers in (0, 2):
        batch = next(iter(DataLoader(images, batch_sampler=[[9, 5, 2]], num_workers=workers)))[0]
        assert torch.equal(batch, torch.stack([alone[2], alone[0], alone[1]]))


def test_each_epoch_and_each_run_draws_anew(images: AugmentedImages, image_folder: Path):
    first = images[4][0]
    images.epoch = 1
    other_run = AugmentedImages(TimmImages(str(image_folder), GREY), AUGMENTATIONS["light"], seed=4)
    assert not torch.equal(images[4][0], first)
    assert not torch.equal(other_run[4][0], first)


def test_an_item_says_its_place_and_seed(images: AugmentedImages):
    _, label, place, seed = images[7]
    assert (place, seed) == (7, augmentation_seed(3, 0, 7))
    assert label in range(10)


def test_seeds_of_a_run_hardly_ever_coincide():
    seeds = {augmentation_seed(0, epoch, place) for epoch in range(10) for place in range(1000)}
    assert len(seeds) >= 9_999


def test_the_global_generators_are_left_alone():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with seeded(5):
        first = random.random(), np.random.rand(), torch.rand(1).item()
    with seeded(5):
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == first
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_unlabelled_images_cannot_be_trained_on(tmp_path: Path, image_folder: Path):
    for path in image_folder.rglob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="no label"):
        AugmentedImages(TimmImages(str(tmp_path), GREY), AUGMENTATIONS["light"])[0]
