"""Opening the images that a step judges by: without torch where they are files, through timm otherwise."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from export.images import ChoosableImages, ImageSet, LabelledImages
from flora.errors import InputError, few
from flora.imagesets import ImageSetRecord, ImageSetSpec
from flora.preprocessing import Preprocessing

if TYPE_CHECKING:
    from flora.training.data import TimmImages

# The part of the calibration images that is held out to choose by, where no others are given.
HELD_OUT = "1/4"
# Above this many images, their digests are not recorded: an overlap with them is not looked for.
MOST_DIGESTS = 100_000


def open_images(text: str, preprocessing: Preprocessing) -> ChoosableImages:
    """The image set that `text` names (see `ImageSetSpec.parse`), preprocessed for one model."""
    if not ImageSetSpec.parse(text).name:
        return LabelledImages(text, preprocessing)
    try:
        from flora.training.data import TimmImages
    except ImportError as error:
        raise InputError(f"{text} is read through torch and timm, which are not installed ({error}).") from error
    return TimmImages(text, preprocessing)


def calibration_and_selection(calib_data: str, select_data: str | None) -> tuple[str, str]:
    """The images to calibrate on and those to choose by: two parts of `calib_data` where the second is not given."""
    if select_data is not None:
        return calib_data, select_data
    spec = ImageSetSpec.parse(calib_data)
    if spec.fold or spec.left_out:
        raise InputError(f"{calib_data} is a part of a set already; say what to choose by with --select-data.")
    return f"{calib_data},except={HELD_OUT}", f"{calib_data},fold={HELD_OUT}"


def check_classes(images: ImageSet, classes: int | None) -> None:
    """Refuse labelled images with another number of classes than the model: their labels would mean something else."""
    named = _named_classes(images)
    if named and classes is not None and named != classes:
        raise InputError(
            f"The images lie in {named} class folders, the model has {classes} classes; "
            "give images of all its classes, as in the data set that it was trained for."
        )


def labels_are_classes(images: ImageSet, classes: int | None) -> bool:
    """Whether every image is labelled, and with classes of the model: calibration images may lie in any folders."""
    if named := _named_classes(images):
        return classes in (None, named)
    labels = images.labels() if hasattr(images, "labels") else None
    return labels is not None and bool((labels >= 0).all() and (classes is None or (labels < classes).all()))


def _named_classes(images: ImageSet) -> int:
    """In how many class folders the images lie; none where they are read through a data set's own labels."""
    return len(getattr(images, "class_names", ()))


class Unlabelled:
    """An image set whose labels mean nothing to the model."""

    def __init__(self, images: ChoosableImages) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Images alone."""
        return ((images, None) for images, _ in self._images.batches(batch_size))

    def labels(self) -> np.ndarray:
        """-1 for every image."""
        return np.full(len(self), -1)

    def chosen(self, indices: Sequence[int]) -> "Unlabelled":
        """The images at these places alone."""
        return Unlabelled(self._images.chosen(indices))

    def names(self) -> list[str] | None:
        """What every image is called within the set."""
        return self._images.names()

    def record(self) -> ImageSetRecord:
        """What an artefact keeps of these images."""
        return self._images.record()


def training_record(text: str, images: ImageSet) -> ImageSetRecord:
    """The record of training images, which may be too many to read each for its digest."""
    if len(images) > MOST_DIGESTS:
        return ImageSetRecord.of(text, len(images), None)
    return images.record()


def identity(images: "TimmImages", record: ImageSetRecord) -> str:
    """What tells image sets apart in the settings of a job: images in order and their labels, wherever they lie.

    Images without digests in `record` go by their names; of a streamed set only its text is known.
    """
    contents = record.image_digests or images.names()
    if contents is None:
        return f"{record.images} of {record.spec}"
    pairs = list(zip(contents, images.labels().tolist(), strict=True))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def names_by_digest(images: "TimmImages", record: ImageSetRecord) -> dict[str, str]:
    """What each image is called within its set, by its digest; nothing where `record` has no digests."""
    return dict(zip(record.image_digests, images.names() or (), strict=True)) if record.image_digests else {}


def refuse_duplicates(text: str, held_out: Mapping[str, str], others: Mapping[str, str]) -> None:
    """Refuse the images `text`, which flora divided itself, where one lies in both parts (names by digest)."""
    twins = [f"{held_out[digest]} is {others[digest]}" for digest in held_out if digest in others]
    if twins:
        raise InputError(
            f"{text} holds {len(twins)} images twice, once among those that are held out to choose by "
            f"({few(twins, 3)}). Remove the duplicates, or give other images to choose by with --select-data."
        )


def certified_images(
    text: str, preprocessing: Preprocessing, classes: int | None, seen: Mapping[Any, ImageSetRecord]
) -> ImageSet:
    """The evaluation images `text`; refused unless they show the model's classes and none is in `seen`, by role."""
    images = open_images(text, preprocessing)
    check_classes(images, classes)
    certified_record(images, seen)
    return images


def certified_record(images: ImageSet, seen: Mapping[Any, ImageSetRecord]) -> ImageSetRecord:
    """The record of evaluation images; refused when an image of the sets in `seen`, by role, is among them."""
    record = images.record()
    for role, other in seen.items():
        record.refuse_overlap(other, own_role="evaluation", other_role=role)
    return record
