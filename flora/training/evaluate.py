"""Accuracy of a torch model on labelled images."""

import math
from collections.abc import Callable, Iterable
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from flora.errors import InputError


class Accuracy(BaseModel):
    """Top-1 and top-5 in percent (`top5` is None with five classes or fewer), and the mean cross-entropy in nats."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    top1: float
    top5: float | None
    loss: float

    @property
    def top1_standard_error(self) -> float:
        """Binomial standard error of `top1`, in points."""
        share = self.top1 / 100
        return 100 * math.sqrt(share * (1 - share) / self.images)

    @classmethod
    def of_logits(cls, logits: Tensor, labels: Tensor) -> Self:
        """From logits [N, classes] and labels [N]."""
        classes = logits.shape[1]
        check_labels(labels, classes, "The images have")
        best = logits.topk(min(5, classes), dim=1).indices
        hits = best == labels[:, None]
        return cls(
            images=len(labels),
            top1=100 * hits[:, 0].double().mean().item(),
            top5=100 * hits.any(1).double().mean().item() if classes > 5 else None,
            loss=F.cross_entropy(logits.float(), labels).item(),
        )


def check_labels(labels: Tensor, classes: int, who_has: str) -> None:
    """Raise `InputError`, which begins with `who_has`, when a label lies beyond the model's classes."""
    if int(labels.max()) >= classes:
        raise InputError(
            f"{who_has} a label {int(labels.max())}, the model has {classes} classes; "
            "use the data set that it was trained for."
        )


@torch.inference_mode()
def logits_of(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    autocast: torch.dtype | None = None,
    on_batch: Callable[[int], None] = lambda images: None,
) -> tuple[Tensor, Tensor]:
    """Logits [N, classes] in float32 and labels [N] over all of `loader`, on the model's device; in eval mode."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    logits, labels = [], []
    try:
        for images, batch_labels in loader:
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                logits.append(model(images.to(device)).float().cpu())
            labels.append(batch_labels)
            on_batch(len(images))
    finally:
        model.train(training)
    if not logits:
        raise InputError("There are no images to evaluate on; give a data set that holds some.")
    return torch.cat(logits), torch.cat(labels)


def evaluate(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], **options) -> Accuracy:
    """Accuracy of `model` over labelled images; `options` are those of `logits_of`."""
    logits, labels = logits_of(model, loader, **options)
    if (labels < 0).any():
        raise InputError("The images carry no labels; put them into one folder for each class.")
    return Accuracy.of_logits(logits, labels)
