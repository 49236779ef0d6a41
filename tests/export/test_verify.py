"""Verification passes what is right and fails what is not, at the stage where it went wrong."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from export_samples import GREY, random_images
from onnx import numpy_helper

from export.images import LabelledImages
from export.runners import OnnxRunner
from export.thresholds import THRESHOLDS, Thresholds
from export.torch_runner import TorchRunner
from export.verify import Stage, StageReport, VerifyReport, verify
from flora.errors import InputError


class ArrayImages:
    """Logits that pass for images: a runner returns what it is given, or a change of it."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def names(self) -> list[str]:
        return [f"{i}.png" for i in range(len(self))]

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        for i in range(0, len(self), batch_size):
            yield self.images[i : i + batch_size], None if self.labels is None else self.labels[i : i + batch_size]


class Changed:
    """A runner that applies a function to what it is given, and notes the sizes of its batches."""

    provider = "numpy"

    def __init__(self, change=lambda logits: logits) -> None:
        self.change, self.sizes = change, []

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.sizes.append(len(images))
        return self.change(images)


def _logits(count: int = 100, classes: int = 10) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, classes)).astype(np.float32)


def _second(change, kind: str, images: ArrayImages) -> StageReport:
    stages = [
        Stage(name="first", runner=Changed(), batch_size=8, kind="fp32"),
        Stage(name="second", runner=Changed(change), batch_size=8, kind=kind, compared_with="first"),
    ]
    return verify(stages, images).stages[1]


def _chain(model, first: Path, second: Path) -> list[Stage]:
    torch_stage = Stage(name="torch", runner=TorchRunner(model, name="torch"), batch_size=8, kind="fp32")
    first_stage = Stage(
        name="onnx batch 1", runner=OnnxRunner(first, threads=1), batch_size=1, kind="fp32", compared_with="torch"
    )
    return [
        torch_stage,
        first_stage,
        Stage(
            name="onnx batch 8",
            runner=OnnxRunner(second, threads=1),
            batch_size=8,
            kind="fp32",
            compared_with="onnx batch 1",
        ),
    ]


@pytest.fixture(scope="module")
def corrupted(onnx_file, tmp_path_factory) -> Path:
    """The exported file with the signs of one weight matrix turned."""
    file = onnx.load(onnx_file)
    weight = next(tensor for tensor in file.graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) > 100)
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    path = tmp_path_factory.mktemp("corrupted") / "model.onnx"
    onnx.save(file, path)
    return path


@pytest.fixture
def images(image_folder) -> LabelledImages:
    return LabelledImages(str(image_folder), GREY)


def test_a_clean_export_passes(model, onnx_file, images):
    report = verify(_chain(model, onnx_file, onnx_file), images)
    assert report.passed
    assert report.first_failure is None
    assert [stage.images for stage in report.stages] == [20, 20, 20]
    assert report.stages[0].top1 == report.stages[2].top1
    assert VerifyReport.model_validate_json(report.model_dump_json()) == report


def test_a_corrupted_weight_fails_at_its_stage(model, onnx_file, corrupted, images):
    assert verify(_chain(model, onnx_file, corrupted), images).first_failure == "onnx batch 8"
    report = verify(_chain(model, corrupted, corrupted), images)
    assert report.first_failure == "onnx batch 1"
    assert [stage.passed for stage in report.stages] == [True, False, True]
    assert any(line.startswith("max_relative is") for line in report.stages[1].failures)


def test_every_stage_gets_its_own_batch_size_and_every_image():
    runners = {size: Changed() for size in (1, 3, 64, 100)}
    stages = [Stage(name=str(size), runner=runners[size], batch_size=size, kind="fp32") for size in runners]
    seen = []
    verify(stages, ArrayImages(_logits(110)), progress=lambda done, total: seen.append((done, total)))
    assert all(sum(runner.sizes) == 110 and max(runner.sizes) == size for size, runner in runners.items())
    assert seen == [(100, 110), (110, 110)]


def test_accuracy_equals_a_count_by_hand():
    logits = _logits()
    labels = np.random.default_rng(1).integers(0, 10, 100)
    report = _second(lambda x: x, "fp32", ArrayImages(logits, labels))
    assert report.top1 == pytest.approx(
        100 * np.mean([row.argmax() == label for row, label in zip(logits, labels, strict=True)])
    )
    five = [label in sorted(range(10), key=lambda c: -row[c])[:5] for row, label in zip(logits, labels, strict=True)]
    assert report.top5 == pytest.approx(100 * np.mean(five))
    share = report.top1 / 100
    assert report.top1_standard_error == pytest.approx(100 * (share * (1 - share) / 100) ** 0.5)


def test_top5_needs_more_than_five_classes_and_constant_logits_are_no_hits():
    labels = np.arange(100) % 5
    report = _second(np.zeros_like, "lowrank", ArrayImages(np.eye(5, dtype=np.float32)[labels], labels))
    assert report.top5 is None
    assert (report.top1, report.drop) == (20, 80)
    assert report.failures == ["drop is 80, above 1"]


def test_a_gain_in_accuracy_is_a_negative_drop():
    labels = np.zeros(100, dtype=np.int64)
    report = _second(lambda x: np.eye(10)[np.zeros(len(x), dtype=int)], "lowrank", ArrayImages(_logits(), labels))
    assert report.passed
    assert report.drop < 0


def test_unlabelled_images_hold_a_low_rank_model_against_agreement_and_say_so():
    kept = _second(lambda x: 2 * x, "lowrank", ArrayImages(_logits()))
    assert kept.passed
    assert (kept.top1, kept.drop) == (None, None)
    assert "no labels" in kept.notes[0]
    lost = _second(lambda x: -x, "lowrank", ArrayImages(_logits()))
    assert lost.failures == ["agreement is 0, below 0.9"]
    assert "not checked" in _second(lambda x: x, "int8", ArrayImages(_logits())).notes[0]


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_each_precision_bears_less_noise_than_the_next(kind):
    bearable = {"fp32": 1e-4, "fp16": 5e-3, "int8": 5e-2}[kind]
    noise = np.random.default_rng(2).standard_normal((100, 10)).astype(np.float32)
    images = ArrayImages(4 * np.eye(10, dtype=np.float32)[np.arange(100) % 10] + 0.1 * _logits())

    def noisy(scale: float):
        return lambda x: x + scale * noise[: len(x)]

    assert _second(noisy(bearable), kind, images).passed
    assert not _second(noisy(bearable * 30), kind, images).passed


def test_logits_that_are_not_finite_fail_and_what_follows_cannot_be_compared():
    def broken(logits):
        return np.where(logits > 2, np.nan, logits)

    images = ArrayImages(_logits(), np.zeros(100, dtype=np.int64))
    stages = [
        Stage(name="first", runner=Changed(), batch_size=8, kind="fp32"),
        Stage(name="broken", runner=Changed(broken), batch_size=8, kind="fp32", compared_with="first"),
        Stage(name="after", runner=Changed(), batch_size=8, kind="fp32", compared_with="broken"),
    ]
    report = verify(stages, images)
    assert report.first_failure == "broken"
    assert "of 100 images have logits that are not finite" in report.stages[1].failures[0]
    assert report.stages[1].top1 is None
    assert report.stages[2].failures == ["cannot be compared: broken gave logits that are not finite"]
    alone = Stage(name="alone", runner=Changed(broken), batch_size=8, kind="fp32")
    assert not verify([alone], images).passed


def test_another_number_of_classes_fails():
    labels = np.full(100, 9)
    report = _second(lambda x: x[:, :8], "fp32", ArrayImages(_logits(), labels))
    assert report.failures == ["gives 8 classes, first gives 10"]


@pytest.mark.parametrize("label", [10, -1])
def test_labels_beyond_the_classes_are_refused(label):
    with pytest.raises(InputError, match=f"the label {label}, stage first gives 10 classes"):
        _second(lambda x: x, "fp32", ArrayImages(_logits(), np.full(100, label)))


def test_one_image_is_enough_and_none_is_not():
    assert _second(lambda x: x, "fp32", ArrayImages(_logits(1), np.array([3]))).passed
    with pytest.raises(InputError, match="no images"):
        _second(lambda x: x, "fp32", ArrayImages(_logits(0)))


def test_an_output_that_is_no_classification_is_refused():
    with pytest.raises(InputError, match=r"Stage second gave an output of shape \[8, 10, 1\] for 8"):
        _second(lambda x: x[..., None], "fp32", ArrayImages(_logits()))


def test_thresholds_can_be_given(model, onnx_file, images):
    report = verify(_chain(model, onnx_file, onnx_file), images, thresholds=THRESHOLDS | {"fp32": Thresholds(max_kl=0)})
    assert report.first_failure == "onnx batch 1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "fp23"}, "Did you mean fp32"),
        ({"batch_size": 0}, "batch size of 0"),
        ({"name": "first"}, "Two stages are called first"),
        ({"compared_with": "later"}, "no earlier stage"),
        ({"compared_with": "second"}, "no earlier stage"),
    ],
)
def test_a_chain_that_makes_no_sense_is_refused(changes, message):
    first = {"name": "first", "runner": Changed(), "batch_size": 1, "kind": "fp32"}
    second = first | {"name": "second", "compared_with": "first"} | changes
    with pytest.raises(InputError, match=message):
        verify([Stage(**first), Stage(**second)], ArrayImages(_logits()))


def test_an_empty_chain_is_refused():
    with pytest.raises(InputError, match="no stage"):
        verify([], ArrayImages(_logits()))


def test_random_images_are_not_all_alike(model):
    """The model of these tests tells images apart; else agreement would prove nothing."""
    with TorchRunner(model, name="torch") as runner:
        assert len(set(runner(random_images(50)).argmax(1))) > 1


def test_a_drop_comes_with_its_interval_and_is_doubted_where_images_are_too_few():
    labels = np.arange(100) % 10
    right = 10 * np.eye(10, dtype=np.float32)[labels]
    images = ArrayImages(right, labels)

    def one_class_wrong(batch):
        return np.where(batch[:, :1] > 0, np.roll(batch, 1, axis=1), batch)

    report = _second(lambda x: x, "lowrank", images)
    assert (report.drop, report.p_value) == (0, 1)
    assert report.drop_low < 0 < report.drop_high
    assert "100 images cannot tell whether it is above 1" in report.notes[0]
    lost = _second(one_class_wrong, "lowrank", images)
    assert lost.drop == 10
    assert lost.drop_high > 10
    assert lost.drop_low > 1
    assert lost.p_value < 0.01
    assert not lost.notes


def test_the_images_furthest_off_are_named_and_those_alike_are_not():
    logits, labels = 4 * np.eye(10, dtype=np.float32)[np.arange(100) % 10], np.arange(100) % 10

    def shifted(batch):
        changed = batch.copy()
        for i, row in enumerate(batch):
            if row[3] == 4:  # images 3, 13, 23, ...
                changed[i] = np.roll(row, 1)
        return changed

    report = _second(shifted, "lowrank", ArrayImages(logits, labels))
    assert [image.index for image in report.worst] == [3, 13, 23, 33, 43]
    assert {(image.name[-5:], image.label, image.expected, image.predicted) for image in report.worst} == {
        ("3.png", 3, 3, 4)
    }
    assert report.worst[0].kl > 1
    assert _second(lambda x: x, "fp32", ArrayImages(logits)).worst == []
    assert _second(shifted, "lowrank", ArrayImages(logits)).worst[0].label is None


@pytest.mark.parametrize(("right", "passes"), [(90, True), (80, True), (70, False)])
def test_a_model_that_is_much_less_right_than_it_is_known_to_be_fails_by_itself(right, passes):
    labels = np.arange(100) % 10
    logits = np.eye(10, dtype=np.float32)[np.where(np.arange(100) < right, labels, (labels + 1) % 10)]
    stage = Stage(name="first", runner=Changed(), batch_size=8, kind="lowrank", expected_top1=90, expected_error=0.5)
    (report,) = verify([stage], ArrayImages(logits, labels)).stages
    assert report.passed == passes
    assert passes or report.failures[0].startswith("top1 is 70.00 on these images, expected is 90.00. Look at")
