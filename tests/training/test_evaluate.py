"""Accuracy equals a case worked by hand, and what cannot be judged is refused."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from flora.errors import InputError
from flora.training.data import TimmImages
from flora.training.evaluate import Accuracy, evaluate, logits_of
from tests.samples import GREY, random_images, tiny_model

LABELS = torch.tensor([3, 1, 9, 0, 7, 2, 5])


def _loader(labels: Tensor, batch_size: int = 3) -> list[tuple[Tensor, Tensor]]:
    return list(zip(random_images(len(labels)).split(batch_size), labels.split(batch_size), strict=True))


def test_accuracy_of_a_case_worked_by_hand():
    """Seven classes, four images: labels at place 1, 2, 5 and 6 by logit, so top-1 is 1/4 and top-5 is 3/4."""
    logits = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]]).repeat(4, 1)
    labels = torch.tensor([0, 1, 4, 5])
    accuracy = Accuracy.of_logits(logits, labels)
    log_sum = math.log(sum(math.exp(logit) for logit in range(7)))
    assert (accuracy.images, accuracy.top1, accuracy.top5) == (4, 25.0, 75.0)
    assert accuracy.loss == pytest.approx(log_sum - (6 + 5 + 2 + 1) / 4, rel=1e-6)
    assert accuracy.top1_standard_error == pytest.approx(100 * math.sqrt(0.25 * 0.75 / 4))


@pytest.mark.parametrize(("classes", "has_top5"), [(2, False), (5, False), (6, True)])
def test_there_is_no_top5_of_five_classes_or_fewer(classes: int, has_top5: bool):
    accuracy = Accuracy.of_logits(torch.eye(classes), torch.arange(classes))
    assert accuracy.top1 == 100
    assert (accuracy.top5 is not None) == has_top5


def test_a_label_beyond_the_classes_is_refused_with_both_numbers():
    with pytest.raises(InputError, match=r"label 10, the model has 10 classes"):
        Accuracy.of_logits(torch.zeros(2, 10), torch.tensor([3, 10]))


def test_an_accuracy_survives_json():
    accuracy = Accuracy.of_logits(torch.eye(6), torch.arange(6))
    assert Accuracy.model_validate_json(accuracy.model_dump_json()) == accuracy


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_evaluation_equals_the_models_logits_in_any_batches(batch_size: int):
    model = tiny_model()
    with torch.no_grad():
        expected = Accuracy.of_logits(model(random_images(7)), LABELS)
    accuracy = evaluate(model, _loader(LABELS, batch_size))
    assert (accuracy.images, accuracy.top1, accuracy.top5) == (expected.images, expected.top1, expected.top5)
    assert accuracy.loss == pytest.approx(expected.loss, rel=1e-5)


def test_logits_come_in_the_order_of_the_images():
    logits, labels = logits_of(tiny_model(), _loader(LABELS))
    with torch.no_grad():
        assert torch.allclose(logits, tiny_model()(random_images(7)), atol=1e-5)
    assert torch.equal(labels, LABELS)


def test_autocast_still_gives_single_precision():
    logits, _ = logits_of(tiny_model(), _loader(LABELS), autocast=torch.bfloat16)
    exact, _ = logits_of(tiny_model(), _loader(LABELS))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, exact)
    assert torch.allclose(logits, exact, atol=0.1 * exact.abs().max())


def test_each_batch_is_reported():
    reported: list[int] = []
    logits_of(tiny_model(), _loader(LABELS), on_batch=reported.append)
    assert reported == [3, 3, 1]


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_runs_in_eval_mode_and_restores_the_former_one(training: bool):
    modes: list[bool] = []
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(28 * 28, 10)).train(training)
    model.register_forward_pre_hook(lambda module, _: modes.append(module[1].training))
    evaluate(model, _loader(LABELS))
    assert modes == [False] * 3
    assert model.training == model[1].training == training


def test_the_former_mode_is_restored_after_an_exception():
    model = tiny_model().train()
    with pytest.raises(AssertionError):
        evaluate(model, [(torch.zeros(1, 1, 5, 5), torch.zeros(1))])
    assert model.training


def test_no_images_are_refused():
    with pytest.raises(InputError, match="no images"):
        evaluate(tiny_model(), [])


def test_images_without_labels_are_refused():
    with pytest.raises(InputError, match="no labels"):
        evaluate(tiny_model(), _loader(torch.tensor([3, -1])))


def test_a_folder_without_class_folders_is_refused(tmp_path: Path):
    for number in range(3):
        Image.new("L", (28, 28), number).save(tmp_path / f"{number}.png")
    with pytest.raises(InputError, match="no labels"):
        evaluate(tiny_model(), TimmImages(str(tmp_path), GREY).loader(2))


def test_a_labelled_folder_is_evaluated(image_folder: Path):
    source = TimmImages(str(image_folder), GREY)
    accuracy = evaluate(tiny_model(), source.loader(8))
    assert accuracy.images == len(source) == 20
