"""What images a model takes, and the one check that all runners hold arrays against before a runtime sees them."""

from dataclasses import dataclass

import numpy as np

from flora.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """The type of numbers, and the length of each dimension, the batch first; None for any length from 1 on."""

    dtype: type[np.floating]
    shape: tuple[int | None, ...]

    def check(self, images: np.ndarray, what: str) -> None:
        """Raise `InputError` naming `what` unless it takes `images`."""
        fits = images.ndim == len(self.shape) and all(
            size in (None, given) for size, given in zip(self.shape, images.shape, strict=True)
        )
        if not fits or images.dtype != self.dtype or images.size == 0:
            wanted = ", ".join("any" if size is None else str(size) for size in self.shape)
            raise InputError(
                f"{what} takes {np.dtype(self.dtype).name} images of shape [{wanted}], got {images.dtype} "
                f"{list(images.shape)}; preprocess the images with the settings of this model."
            )
