"""Which images a model is calibrated on: a few, as many of each class where labels are known, the same for a seed."""

from collections.abc import Sequence

import numpy as np


def balanced_choice(labels: Sequence[int] | np.ndarray, count: int, *, seed: int = 0) -> list[int]:
    """Indices of `count` images, or of all there are, by their `labels` [N] (-1 where there is none), ascending.

    One image of each class in turn, until there are enough: classes differ by one image at most, unless they run out.
    """
    labels = np.asarray(labels)
    draw = np.random.default_rng(seed)
    shuffled = [draw.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    turns = [(place, draw.random(), index) for part in shuffled for place, index in enumerate(part)]
    return sorted(int(index) for _, _, index in sorted(turns)[:count])
