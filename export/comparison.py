"""How far the logits of one stage are from those of another, image by image.

Kept per image and summed up only in the end, so that any number of images can be compared in batches. Everything is
computed in float64; the divergence is that of the softmax of the stage before from this one's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One value for each image: `expected` is the reference's class, `predicted` the other's.

    `largest` is the largest reference logit by size.
    """

    expected: np.ndarray
    predicted: np.ndarray
    cosine: np.ndarray
    kl: np.ndarray
    max_abs: np.ndarray
    largest: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in cls.__annotations__})

    @property
    def agrees(self) -> np.ndarray:
        """Where both see the same class."""
        return self.expected == self.predicted

    @property
    def max_relative(self) -> float:
        """The largest difference of all as a share of the largest reference logit of all."""
        return float(self.max_abs.max() / (self.largest.max() or 1.0))


def compare(reference: np.ndarray, logits: np.ndarray) -> Comparison:
    """Compare `logits` with `reference`, both [B, classes] and finite."""
    reference, logits = reference.astype(np.float64), logits.astype(np.float64)
    return Comparison(
        expected=reference.argmax(1),
        predicted=logits.argmax(1),
        cosine=_cosine(reference, logits),
        kl=_kl(reference, logits),
        max_abs=np.abs(reference - logits).max(1),
        largest=np.abs(reference).max(1),
    )


def _cosine(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Cosine per row; rows of zeros are like each other and unlike all else."""
    norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(logits, axis=1)
    both_zero = ~reference.any(1) & ~logits.any(1)
    return np.where(both_zero, 1.0, (reference * logits).sum(1) / np.where(norms > 0, norms, 1.0))


def _kl(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """sum p (log p - log q) per row in nats, with p the reference's softmax."""
    log_p, log_q = _log_softmax(reference), _log_softmax(logits)
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(1), 0.0)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
