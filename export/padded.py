"""Runs any number of images in batches of one size, which is what an engine may insist on."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np

from export.runners import Runner


class PaddedRunner:
    """Another runner, always called with `batch` images: the last ones are filled up, what they give is left out."""

    def __init__(self, runner: Runner, batch: int) -> None:
        self.name, self.provider, self.described = runner.name, runner.provider, runner.described
        self._runner, self._batch = runner, batch

    def __enter__(self) -> Self:
        self._runner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.__exit__(kind, error, trace)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits [B, classes] of images [B, C, H, W]."""
        count = -(-len(images) // self._batch) * self._batch
        filled = np.resize(images, (count, *images.shape[1:]))
        parts = [self._runner(filled[i : i + self._batch]) for i in range(0, count, self._batch)]
        return np.concatenate(parts)[: len(images)]

    def bind(self, images: np.ndarray) -> Callable[[], object]:
        """A call that runs `images`, as many as a batch has."""
        return self._runner.bind(images)
