"""Images from any dataset that timm's factory reads, with the model's own evaluation transform."""

import copy
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, cast

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from flora.errors import BackendMissingError, InputError, near_matches
from flora.imagesets import ImageSetRecord, ImageSetSpec, image_digest
from flora.preprocessing import Preprocessing


class TimmImages:
    """An opened image set: batches of preprocessed images with labels, and a record for artefacts."""

    def __init__(self, text: str, preprocessing: Preprocessing, *, workers: int = 0) -> None:
        self.text = text
        self.spec = ImageSetSpec.parse(text)
        self.preprocessing = preprocessing
        self.workers = workers
        self._source = _open(self.spec, preprocessing.image_mode)
        is_part = self.spec.limit is not None or self.spec.fold or self.spec.left_out
        if isinstance(self._source, IterableDataset) and is_part:
            raise InputError(
                f"{text}: a streamed data set takes no limit, fold or except; use one that is read by index, or name "
                "images for each purpose, such as --select-data IMAGES."
            )
        self._indices = None if isinstance(self._source, IterableDataset) else self.spec.indices(len(self._source))

    def __len__(self) -> int:
        return len(self._source) if self._indices is None else len(self._indices)

    @property
    def is_streamed(self) -> bool:
        """Whether the images come in an order of their own, and none can be asked for."""
        return self._indices is None

    def loader(self, batch_size: int) -> DataLoader:
        """Yields images [B, C, H, W] float32 and labels [B] (-1 where there is none)."""
        transform = eval_transform(self.preprocessing)
        if self._indices is None:
            self._source.transform = transform
            return DataLoader(self._source, batch_size=batch_size, num_workers=self.workers)
        return DataLoader(self.dataset(transform), batch_size=batch_size, num_workers=self.workers)

    def dataset(self, transform: Callable[[Image.Image], Tensor]) -> Subset:
        """The images under `transform`, read by index: pairs of image and label (-1 where there is none)."""
        if self._indices is None:
            raise InputError(f"{self.text}: a streamed data set cannot be trained on; use one that is read by index.")
        return Subset(_Decoded(self._source, self.preprocessing.image_mode, transform), self._indices)

    def digests(self) -> list[str] | None:
        """The digest of every image (its file's bytes, or its pixels where no files are kept), None when streamed."""
        if self._indices is None:
            return None
        return [image_digest(_content(self._source, i)) for i in self._indices]

    def names(self) -> list[str] | None:
        """What every image is called within the set, else its place; no file is read for it. None when streamed."""
        if self._indices is None:
            return None
        return [_name(self._source, i) for i in self._indices]

    def labels(self) -> Tensor:
        """The label of every image [N] (-1 where there is none); files are not decoded for it."""
        dataset = self.dataset(eval_transform(self.preprocessing))
        return torch.tensor([cast(_Decoded, dataset.dataset).label(i) for i in dataset.indices])

    def chosen(self, indices: Sequence[int]) -> Self:
        """The images at these places alone."""
        if self._indices is None:
            raise InputError(f"{self.text}: no images can be chosen from a streamed data set; use one read by index.")
        part = copy.copy(self)
        part._indices = [self._indices[i] for i in indices]
        return part

    def images(self, batch_size: int) -> "ImageBatches":
        """The images alone, as an iterable that can be read several times."""
        return ImageBatches(self, batch_size)

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """The same as arrays; labels are None where the set has none."""
        for images, labels in self.loader(batch_size):
            yield images.numpy(), None if (labels < 0).any() else labels.numpy()

    def record(self) -> ImageSetRecord:
        """What an artefact keeps of these images."""
        return ImageSetRecord.of(self.text, len(self), self.digests())


class ImageBatches:
    """Iterable of image batches [B, C, H, W]; each iteration reads the set anew."""

    def __init__(self, source: TimmImages, batch_size: int) -> None:
        self.source, self.batch_size = source, batch_size

    def __iter__(self) -> Iterator[Tensor]:
        return (images for images, _ in self.source.loader(self.batch_size))


class _Decoded(Dataset):
    """A map-style dataset that fails on an undecodable image (timm's own replaces it by the next one).

    The label is -1 where timm has none, and where a folder holds no class folders (one nameless class for timm).
    """

    def __init__(self, source: Any, mode: str, transform: Callable[[Image.Image], Tensor]) -> None:
        self.source, self.mode, self.transform = source, mode, transform
        classes = getattr(getattr(source, "reader", None), "class_to_idx", None)
        self.labelled = not classes or not set(classes) <= {"", "."}

    def label(self, index: int) -> int:
        """The label of one image, out of the list of labels where there is one."""
        reader = getattr(self.source, "reader", self.source)
        if isinstance(reader, ReaderImageFolder):
            label = reader.samples[index][1]
        elif isinstance(targets := getattr(reader, "targets", None), (list, np.ndarray)):
            label = targets[index]
        else:
            label = reader[index][1]
        return label if self.labelled and label is not None else -1

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if hasattr(self.source, "reader"):
            file, label, *_ = self.source.reader[index]
            try:
                image = Image.open(file).convert(self.mode)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise InputError(
                    f"{self.source.filename(index)} cannot be decoded as an image; repair or remove it."
                ) from error
        else:
            image, label = self.source[index]
            image = image.convert(self.mode)
        return self.transform(image), label if self.labelled and label is not None else -1


def eval_transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """timm's evaluation transform for these settings: PIL image -> [C, H, W]."""
    return create_transform(**preprocessing.model_dump(), is_training=False)


def _open(spec: ImageSetSpec, mode: str) -> Any:
    try:
        return create_dataset(spec.name, root=spec.root or None, split=spec.split, input_img_mode=mode)
    except ImportError as error:
        raise BackendMissingError(f"{spec.name} needs a package that is not installed: {error}") from error
    except (RuntimeError, OSError, AssertionError, ValueError, TypeError, tarfile.TarError) as error:
        if spec.name and not spec.root:
            raise InputError(f"Say where {spec.name} lies: {spec.name},root=DIR.") from error
        reason = str(error).rstrip(".") or f"{spec.root} does not exist"
        hint = near_matches(spec.name.partition("/")[2], _torchvision_names()) if spec.name.startswith("torch/") else ""
        raise InputError(f"The images {spec.name or spec.root} cannot be read: {reason}.{hint}") from error


def _torchvision_names() -> list[str]:
    from timm.data.dataset_factory import _TORCH_BASIC_DS

    return list(_TORCH_BASIC_DS)


def _name(source: Any, index: int) -> str:
    if hasattr(source, "reader"):
        return str(source.filename(index))
    if hasattr(source, "imgs"):
        return os.path.relpath(source.imgs[index][0], source.root)
    return str(index)


def _content(source: Any, index: int) -> bytes:
    if hasattr(source, "reader"):
        return source.reader[index][0].read()
    image = source[index][0]
    if isinstance(image, Image.Image):
        return repr((image.mode, image.size)).encode() + image.tobytes()
    buffer = io.BytesIO()
    torch.save(image, buffer)
    return buffer.getvalue()
