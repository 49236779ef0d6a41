"""What one stage of a verification has shown so far, batch by batch; logits themselves are not kept."""

import math

import numpy as np
from pydantic import BaseModel, ConfigDict

from export.comparison import Comparison, compare
from flora.errors import InputError

WORST = 5
# In nats: below, images are no worse than others.
NOTABLE_KL = 1e-3


class WorstImage(BaseModel):
    """An image that a stage sees otherwise than the stage that it is compared with, `kl` nats apart.

    `index` is its place in the set and `name` what it is called there, `expected` the compared stage's class. `file` is
    its picture in a bundle.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    name: str
    label: int | None = None
    predicted: int
    expected: int
    kl: float
    file: str | None = None


class Tally:
    """Hits against labels and comparisons with the stage before; `name` is the stage's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.images = 0
        self.non_finite: list[int] = []
        self.classes = 0
        self.reference_classes: int | None = None
        self._hits: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._comparisons: list[Comparison] = []

    def add(self, logits: np.ndarray, labels: np.ndarray | None, reference: np.ndarray | None) -> None:
        """Take in logits [B, classes], labels [B] if any, the logits of the compared stage if any."""
        self.non_finite += (self.images + np.flatnonzero((~np.isfinite(logits)).any(1))).tolist()
        self.images += len(logits)
        self.classes = logits.shape[1]
        if labels is not None:
            best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
            self._hits.append(best == labels[:, None])
            self._labels.append(labels)
            self._check_labels(labels, start_of_chain=reference is None)
        if reference is not None:
            self.reference_classes = reference.shape[1]
            if reference.shape == logits.shape and np.isfinite(logits).all() and np.isfinite(reference).all():
                self._comparisons.append(compare(reference, logits))

    def accuracy(self) -> dict[str, float | None]:
        """`top1` and `top5` in percent and the error of `top1` in points, as far as there are labels and numbers."""
        if not self._is_labelled or self.non_finite:
            return {}
        hits = np.concatenate(self._hits)
        top1 = float(hits[:, 0].mean())
        return {
            "top1": 100 * top1,
            "top1_standard_error": 100 * math.sqrt(top1 * (1 - top1) / self.images),
            "top5": 100 * float(hits.any(1).mean()) if self.classes > 5 else None,
        }

    def right(self) -> np.ndarray | None:
        """Whether each image's class was seen, [N]; None without labels or with logits that are not finite."""
        return None if not self._is_labelled or self.non_finite else np.concatenate(self._hits)[:, 0]

    def differences(self) -> dict[str, float]:
        """Figures against the compared stage, where every image could be compared."""
        if (joined := self._joined()) is None:
            return {}
        return {
            "agreement": float(joined.agrees.mean()),
            "cosine": float(joined.cosine.mean()),
            "max_abs": float(joined.max_abs.max()),
            "max_relative": joined.max_relative,
            "kl": float(joined.kl.mean()),
        }

    def worst(self, names: list[str] | None) -> list[WorstImage]:
        """The images furthest from the compared stage, the worst first; `names` are those of all images."""
        if (joined := self._joined()) is None:
            return []
        notable = ~joined.agrees | (joined.kl > NOTABLE_KL)
        labels = np.concatenate(self._labels) if self._is_labelled else None
        return [
            WorstImage(
                index=index,
                name=names[index] if names else f"image {index}",
                label=None if labels is None else int(labels[index]),
                predicted=int(joined.predicted[index]),
                expected=int(joined.expected[index]),
                kl=float(joined.kl[index]),
            )
            for index in np.argsort(-joined.kl, kind="stable")[:WORST].tolist()
            if notable[index]
        ]

    @property
    def _is_labelled(self) -> bool:
        return sum(map(len, self._hits)) == self.images

    def _joined(self) -> Comparison | None:
        """All comparisons, where every image could be compared."""
        if sum(len(part.kl) for part in self._comparisons) != self.images:
            return None
        return Comparison.joined(self._comparisons)

    def _check_labels(self, labels: np.ndarray, *, start_of_chain: bool) -> None:
        if labels.min() < 0 or (start_of_chain and labels.max() >= self.classes):
            bad = labels.min() if labels.min() < 0 else labels.max()
            raise InputError(
                f"The images have the label {bad}, stage {self.name} gives {self.classes} classes; "
                "use the data set that the model was trained for."
            )
