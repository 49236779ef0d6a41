"""Labelled images from a folder or a tar file of class folders, read without torch.

Order, class names and class indices are those of timm's `create_dataset('', root=PATH)`: a class is named by the
folder that an image lies in, classes and images are in natural order ("10" after "9"), and a folder that has a
subfolder for the split (`val`, `validation`, ...) is read from there. Images that lie in no folder carry no labels.
"""

import copy
import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, Self

import numpy as np
from PIL import Image

from export.preprocessing import preprocess
from flora.errors import InputError
from flora.imagesets import ImageSetRecord, ImageSetSpec, image_digest
from flora.preprocessing import Preprocessing

EXTENSIONS = (".png", ".jpg", ".jpeg")
SPLIT_SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))


class ImageSet(Protocol):
    """What verification reads: preprocessed images, with labels where there are any."""

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Images float32 [B, C, H, W] and labels int64 [B], or None for the labels."""
        ...

    def names(self) -> list[str] | None:
        """What every image is called within the set; None where that is not known."""
        ...

    def record(self) -> ImageSetRecord:
        """What an artefact keeps of these images."""
        ...


class ChoosableImages(ImageSet, Protocol):
    """Images that can be asked for one by one."""

    def labels(self) -> Any:
        """The label of every image as an array [N] (-1 where there is none)."""
        ...

    def chosen(self, indices: Sequence[int]) -> Self:
        """The images at these places alone."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """One image file: `size` bytes from `offset` on in `file` (the whole file without a size)."""

    name: str
    class_name: str
    file: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class LabelledImages:
    """The images of `PATH[,split=NAME][,limit=N]`, preprocessed for one model."""

    def __init__(self, text: str, preprocessing: Preprocessing) -> None:
        self.text = str(text)
        self.preprocessing = preprocessing
        spec = ImageSetSpec.parse(self.text)
        if spec.name:
            raise InputError(f"{text} is read through torch and timm; without them give a folder or a .tar file.")
        samples = _find_samples(Path(spec.root), spec.split)
        names = sorted({sample.class_name for sample in samples}, key=natural_key)
        self.class_names: tuple[str, ...] = () if names in ([""], ["."]) else tuple(names)
        self._indices = {name: i for i, name in enumerate(self.class_names)}
        self._samples = [samples[i] for i in spec.indices(len(samples))]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | None]:
        """The decoded image and its class index, None for unlabelled images."""
        sample = self._samples[index]
        try:
            image = Image.open(io.BytesIO(sample.read()))
            image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(
                f"{self.text}: {sample.name} cannot be decoded as an image; repair or remove it."
            ) from error
        return image, self._indices.get(sample.class_name)

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Images float32 [B, C, H, W] and labels int64 [B] (None without labels); the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            pairs = [self[i] for i in range(start, min(start + batch_size, len(self)))]
            images = np.stack([preprocess(image, self.preprocessing) for image, _ in pairs])
            yield images, np.array([label for _, label in pairs], dtype=np.int64) if self.class_names else None

    def labels(self) -> np.ndarray:
        """The label of every image, int64 [N] (-1 where there is none); no file is read for it."""
        return np.array([self._indices.get(sample.class_name, -1) for sample in self._samples], dtype=np.int64)

    def chosen(self, indices: Sequence[int]) -> Self:
        """The images at these places alone."""
        part = copy.copy(self)
        part._samples = [self._samples[i] for i in indices]
        return part

    def names(self) -> list[str]:
        """What every image is called within the set; no file is read for it."""
        return [sample.name for sample in self._samples]

    def digests(self) -> list[str]:
        """One digest for each image file, in order."""
        return [image_digest(sample.read()) for sample in self._samples]

    def record(self) -> ImageSetRecord:
        """What an artefact keeps of these images."""
        return ImageSetRecord.of(self.text, len(self), self.digests())


def natural_key(text: str) -> list[str | int]:
    """Sort key by which numbers in a name count as numbers."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", text.lower()))]


def _find_samples(path: Path, split: str) -> list[_Sample]:
    if not path.exists():
        raise InputError(f"{path} does not exist; give a folder or a .tar file of class folders.")
    if path.is_file() and path.suffix != ".tar":
        raise InputError(f"{path} is a file but no .tar; give a folder or an uncompressed .tar file of class folders.")
    samples = _in_tar(path) if path.is_file() else _in_folder(_split_folder(path, split))
    if not samples:
        raise InputError(f"{path} holds no images; files with the endings {', '.join(EXTENSIONS)} are read.")
    return samples


def _split_folder(root: Path, split: str) -> Path:
    synonyms = next((names for names in SPLIT_SYNONYMS if split in names), ())
    return next((root / name for name in (split, *synonyms) if (root / name).exists()), root)


def _in_folder(root: Path) -> list[_Sample]:
    samples = []
    for folder, _, names in os.walk(root, topdown=False, followlinks=True):
        class_name = "" if Path(folder) == root else Path(folder).name
        for name in filter(_is_image, names):
            file = Path(folder, name)
            samples.append(_Sample(name=str(file.relative_to(root)), class_name=class_name, file=file))
    return sorted(samples, key=lambda sample: natural_key(str(sample.file)))


def _in_tar(path: Path) -> list[_Sample]:
    try:
        with tarfile.open(path, mode="r:") as archive:
            members = [member for member in archive if member.isfile()]
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path} is no complete, uncompressed tar file: {error}. Write or copy it again.") from error
    if nested := [member.name for member in members if member.name.lower().endswith(".tar")]:
        raise InputError(f"{path} holds the tar file {nested[0]}; unpack it and give a folder of class folders.")
    samples = [
        _Sample(
            name=member.name,
            class_name=PurePosixPath(member.name).parent.name,
            file=path,
            offset=member.offset_data,
            size=member.size,
        )
        for member in members
        if _is_image(member.name)
    ]
    return sorted(samples, key=lambda sample: natural_key(sample.name))


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in EXTENSIONS
