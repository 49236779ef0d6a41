"""Selection images come in one fixed fair order, and a subnet's score is what its own logits say."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora.errors import InputError
from flora.lowrank.supernet import active_ranks, elastic_layers, set_ranks
from flora.ranks.cost import ModelCost
from flora.training import selection
from flora.training.data import TimmImages
from flora.training.selection import FITNESSES, NEEDS_LABELS, SelectionImages, SubnetScores, log_probabilities
from tests.samples import GREY, random_ranks, smallest, tiny_model

IMAGES = 20
PIECES = [(0, 20), (0, 7), (7, 14), (5, 9), (6, 20), (19, 20), (3, 3)]


@pytest.fixture
def images(image_folder: Path) -> SelectionImages:
    return selected(image_folder)


@pytest.fixture
def unlabelled(image_folder: Path, tmp_path: Path) -> SelectionImages:
    for path in image_folder.rglob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return selected(tmp_path)


def selected(folder: Path, *, seed: int = 0) -> SelectionImages:
    return SelectionImages(TimmImages(str(folder), GREY), batch_size=7, seed=seed)


def piece(images: SelectionImages, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
    batches = list(images.batches(start, stop))
    if not batches:
        return torch.empty(0, *GREY.input_size), torch.empty(0, dtype=torch.long)
    return torch.cat([batch for batch, _ in batches]), torch.cat([labels for _, labels in batches])


def scores_of(supernet: nn.Module, images: SelectionImages, fitness) -> SubnetScores:
    return SubnetScores(supernet, images, fitness=fitness, dense=None if fitness in NEEDS_LABELS else tiny_model())


def test_the_order_is_fixed_by_the_seed(image_folder: Path):
    first, again, other = (piece(selected(image_folder, seed=seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_image_comes_once_with_its_label(images: SelectionImages, image_folder: Path):
    def content(batch: Tensor, labels: Tensor) -> Counter:
        return Counter((image.numpy().tobytes(), int(label)) for image, label in zip(batch, labels, strict=True))

    in_folder = next(iter(TimmImages(str(image_folder), GREY).loader(IMAGES)))
    assert len(images) == IMAGES
    assert content(*piece(images)) == content(*in_folder)
    assert not torch.equal(piece(images)[0], in_folder[0])


def test_a_first_part_is_a_fair_sample(image_folder: Path):
    """The folder is sorted by class; over 40 orders, each class comes in the first half about as often as the others"""
    counts = Counter(
        label for seed in range(40) for label in piece(selected(image_folder, seed=seed), 0, 10)[1].tolist()
    )
    assert sorted(counts) == list(range(10))
    assert all(25 <= count <= 55 for count in counts.values())


@pytest.mark.parametrize("memory_bytes", [selection.MEMORY_BYTES, 0], ids=["in memory", "read again"])
@pytest.mark.parametrize(("start", "stop"), PIECES)
def test_a_piece_is_its_part_of_the_whole(image_folder, monkeypatch, memory_bytes: int, start: int, stop: int):
    whole, labels = piece(selected(image_folder))
    monkeypatch.setattr(selection, "MEMORY_BYTES", memory_bytes)
    images = selected(image_folder)
    for _ in range(2):
        found, found_labels = piece(images, start, stop)
        assert torch.equal(found, whole[start:stop])
        assert torch.equal(found_labels, labels[start:stop])


def test_images_without_class_folders_have_no_labels(unlabelled: SelectionImages):
    assert set(piece(unlabelled)[1].tolist()) == {-1}


@torch.no_grad()
def test_log_probabilities_are_those_of_the_model_in_eval_mode(images: SelectionImages):
    model = tiny_model()
    expected = model(piece(images, 3, 16)[0]).log_softmax(dim=1)
    model.head_drop = nn.Dropout(0.5)
    found = log_probabilities(model.train(), images, 3, 16)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fitness", FITNESSES)
@pytest.mark.parametrize("seed", range(2))
@torch.no_grad()
def test_a_score_is_what_the_subnets_logits_say(supernet, vit_cost: ModelCost, images, fitness, seed: int):
    ranks = random_ranks(vit_cost, seed)
    batch, labels = piece(images)
    with active_ranks(supernet, ranks):
        logits = supernet(batch)
    dense = tiny_model()(batch)
    expected = {
        "top1": (logits.argmax(1) == labels).float(),
        "loss": -F.cross_entropy(logits, labels, reduction="none"),
        "agreement": (logits.argmax(1) == dense.argmax(1)).float(),
        "distance": -F.kl_div(logits.log_softmax(1), dense.softmax(1), reduction="none").sum(1),
    }[fitness]
    (scores,) = scores_of(supernet, images, fitness)([ranks], 0, IMAGES)
    assert scores.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(scores), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fitness", FITNESSES)
def test_the_scores_of_pieces_add_up_to_those_of_all_images(supernet, vit_cost, images, fitness):
    scores, ranks = scores_of(supernet, images, fitness), random_ranks(vit_cost, 3)
    (whole,) = scores([ranks], 0, IMAGES)
    parts = [scores([ranks], start, stop)[0] for start, stop in ((0, 5), (5, 14), (14, IMAGES))]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)


def test_scores_come_in_the_order_of_the_configs(supernet: nn.Module, vit_cost: ModelCost, images: SelectionImages):
    scores = scores_of(supernet, images, "loss")
    configs = [random_ranks(vit_cost, seed) for seed in range(3)]
    alone = [scores([ranks], 0, IMAGES)[0] for ranks in configs]
    together = scores(configs[::-1], 0, IMAGES)
    assert all(np.array_equal(a, b) for a, b in zip(alone, together[::-1], strict=True))
    assert not np.array_equal(alone[0], alone[1])


def test_at_full_rank_a_supernet_agrees_with_its_dense_model(supernet, vit_cost: ModelCost, images: SelectionImages):
    (agreement,) = scores_of(supernet, images, "agreement")([vit_cost.dense_ranks], 0, IMAGES)
    (distance,) = scores_of(supernet, images, "distance")([vit_cost.dense_ranks], 0, IMAGES)
    (far,) = scores_of(supernet, images, "distance")([smallest(vit_cost)], 0, IMAGES)
    assert (agreement == 1).all()
    assert abs(distance).max() < 1e-6
    assert far.mean() < -0.01


def test_scoring_leaves_the_ranks_of_the_supernet(supernet: nn.Module, vit_cost: ModelCost, images: SelectionImages):
    set_ranks(supernet, random_ranks(vit_cost, 1))
    before = {name: layer.rank for name, layer in elastic_layers(supernet).items()}
    scores_of(supernet, images, "distance")([smallest(vit_cost), vit_cost.dense_ranks], 0, IMAGES)
    assert {name: layer.rank for name, layer in elastic_layers(supernet).items()} == before


@pytest.mark.parametrize("fitness", NEEDS_LABELS)
def test_without_labels_a_fitness_that_needs_them_is_refused(supernet: nn.Module, unlabelled, fitness):
    with pytest.raises(InputError, match=f"no labels, which the fitness {fitness} needs.*distance or agreement"):
        scores_of(supernet, unlabelled, fitness)


def test_without_labels_the_dense_model_is_compared_with(supernet: nn.Module, vit_cost: ModelCost, unlabelled):
    (agreement,) = scores_of(supernet, unlabelled, "agreement")([vit_cost.dense_ranks], 0, IMAGES)
    assert (agreement == 1).all()


@pytest.mark.parametrize("fitness", NEEDS_LABELS)
def test_a_label_beyond_the_classes_is_refused_with_both_numbers(supernet: nn.Module, images, fitness):
    supernet.reset_classifier(7)
    with pytest.raises(InputError, match="label 9, the model has 7 classes"):
        scores_of(supernet, images, fitness)


@pytest.mark.parametrize("fitness", [fitness for fitness in FITNESSES if fitness not in NEEDS_LABELS])
def test_a_comparison_needs_the_dense_model(supernet: nn.Module, images: SelectionImages, fitness):
    with pytest.raises(InputError, match=f"{fitness} compares with the dense model"):
        SubnetScores(supernet, images, fitness=fitness)


def test_no_images_are_refused(image_folder: Path):
    text = f"{image_folder},fold=30/30"
    with pytest.raises(InputError, match="fold=30/30 holds no images"):
        SelectionImages(TimmImages(text, GREY))
