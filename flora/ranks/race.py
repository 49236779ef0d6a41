"""Successive halving: spend images on the rank configs that may still be among the best.

All candidates are scored on the same few images first. Scores of two configs on the same image go up and down together,
so the paired differences tell far more than the two means do: a candidate is dropped when its difference to the
`keep`-th best is below zero by more than `z` standard errors. What stays is scored on more images, in the end on all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from flora.errors import InputError
from flora.ranks.cost import Rank

FEWEST_IMAGES = 64
Evaluate = Callable[[Sequence[Mapping[str, Rank]], int, int], Sequence[np.ndarray]]
"""`evaluate(configs, start, stop)` scores the images from `start` to `stop` for each config; higher is better."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Raced:
    """A config with the scores (float32) of the first `images` images; one that was not dropped has all of them."""

    ranks: dict[str, Rank]
    images: int
    score: float
    scores: np.ndarray


def race(
    candidates: Sequence[Mapping[str, Rank]],
    evaluate: Evaluate,
    *,
    images: int,
    keep: int,
    rungs: Sequence[int] | None = None,
    incumbents: Sequence[np.ndarray] = (),
    z: float = 2.58,
) -> list[Raced]:
    """Score the candidates on up to `images` images, dropping those that are not among the `keep` best.

    `rungs` are the numbers of images after which candidates are dropped, by default a sixteenth and a quarter of all,
    at least 64. `incumbents` are the scores of configs that were scored on all images before; they count towards the
    `keep` best. The result is in the order of the candidates, which has no influence on it.
    """
    stops = _stops(images, rungs)
    if keep < 1 or any(scores.shape != (images,) for scores in incumbents):
        raise InputError(f"A race keeps at least one, got {keep}; incumbents have scores of all {images} images.")
    scores = [np.empty(0, np.float32) for _ in candidates]
    racing = list(range(len(candidates)))
    for start, stop in pairwise((0, *stops)):
        if not racing:
            break
        parts = _scored(evaluate, [candidates[i] for i in racing], start, stop)
        for i, part in zip(racing, parts, strict=True):
            scores[i] = np.concatenate([scores[i], part])
        if stop < images:
            threshold = _threshold([scores[i] for i in racing] + [known[:stop] for known in incumbents], keep)
            racing = [i for i in racing if threshold is None or not _is_worse(scores[i], threshold, z)]
    return [
        Raced(ranks=dict(ranks), images=len(scored), score=mean_score(scored), scores=scored)
        for ranks, scored in zip(candidates, scores, strict=True)
    ]


def mean_score(scores: np.ndarray) -> float:
    """The mean over images, summed in float64."""
    return float(scores.mean(dtype=np.float64))


def _stops(images: int, rungs: Sequence[int] | None) -> tuple[int, ...]:
    if images < 1:
        raise InputError(f"A race needs at least one image, got {images}.")
    if rungs is None:
        rungs = sorted({max(FEWEST_IMAGES, images // 16), max(FEWEST_IMAGES, images // 4)})
        return (*(rung for rung in rungs if rung < images), images)
    if not rungs or rungs[0] < 1 or rungs[-1] != images or any(a >= b for a, b in pairwise(rungs)):
        raise InputError(f"The rungs of a race ascend and end with all {images} images, got {list(rungs)}.")
    return tuple(rungs)


def _scored(evaluate: Evaluate, configs: list[Mapping[str, Rank]], start: int, stop: int) -> list[np.ndarray]:
    parts = [np.asarray(part, dtype=np.float32) for part in evaluate(configs, start, stop)]
    shapes = {part.shape for part in parts}
    if len(parts) != len(configs) or shapes != {(stop - start,)}:
        raise InputError(
            f"An evaluation of {len(configs)} configs on {stop - start} images gave {len(parts)} arrays of {shapes}."
        )
    if not all(np.isfinite(part).all() for part in parts):
        raise InputError(f"The scores of images {start} to {stop} are not finite; evaluate in a wider number format.")
    return parts


def _threshold(scores: list[np.ndarray], keep: int) -> np.ndarray | None:
    """The scores with the `keep`-th best mean, None where there are fewer; their bytes decide between equal means."""
    if len(scores) < keep:
        return None
    return sorted(scores, key=lambda known: (-mean_score(known), known.tobytes()))[keep - 1]


def _is_worse(scores: np.ndarray, threshold: np.ndarray, z: float) -> bool:
    """Whether the mean paired difference lies below zero by more than `z` of its standard errors."""
    difference = scores.astype(np.float64) - threshold
    if len(difference) < 2:
        return False
    return bool(difference.mean() < -z * difference.std(ddof=1) / np.sqrt(len(difference)))
