"""Selection images, and how good a subnet is on each of them: what filtering and search choose by."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from flora.errors import InputError
from flora.lowrank.supernet import active_ranks
from flora.ranks.cost import Rank
from flora.training.data import TimmImages, eval_transform
from flora.training.evaluate import check_labels
from flora.training.processes import spread

Fitness = Literal["top1", "loss", "agreement", "distance"]
FITNESSES: dict[Fitness, str] = {
    "top1": "share of images classified correctly",
    "loss": "mean log-probability of the label",
    "agreement": "share of images classified as the dense model does",
    "distance": "mean negative Kullback-Leibler divergence from the dense model's probabilities",
}
NEEDS_LABELS = ("top1", "loss")
MEMORY_BYTES = 4 * 2**30


class SelectionImages:
    """Preprocessed images in one fixed random order, so that any first part is a fair sample of the whole.

    They stay in memory where they fit into four GiB, and are read again for each pass otherwise.
    """

    def __init__(self, images: TimmImages, *, batch_size: int = 250, seed: int = 0) -> None:
        self.source, self.batch_size = images, batch_size
        if not len(images):
            raise InputError(f"{images.text} holds no images to select on.")
        self._dataset = images.dataset(eval_transform(images.preprocessing))
        self._order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self._order)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [B, C, H, W] and labels [B] (-1 where there is none) of the places from `start` to `stop`."""
        stop = len(self) if stop is None else stop
        if self._fits and self._kept is None:
            self._kept = list(self._load(0, len(self)))
        if self._kept is None:
            yield from self._load(start, stop)
            return
        for number, (images, labels) in enumerate(self._kept):
            first = number * self.batch_size
            part = slice(max(start - first, 0), max(stop - first, 0))
            if len(labels[part]):
                yield images[part], labels[part]

    @property
    def _fits(self) -> bool:
        return len(self) * 4 * int(np.prod(self.source.preprocessing.input_size)) <= MEMORY_BYTES

    def _load(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        part = Subset(self._dataset, self._order[start:stop])
        return iter(DataLoader(part, batch_size=self.batch_size, num_workers=self.source.workers))


@torch.inference_mode()
def log_probabilities(model: nn.Module, images: SelectionImages, start: int = 0, stop: int | None = None) -> Tensor:
    """Log-probabilities [N, classes] of `model` in eval mode for the images from `start` to `stop`."""
    device = next(model.parameters()).device
    model.eval()
    parts = [model(batch.to(device)).float().log_softmax(dim=1).cpu() for batch, _ in images.batches(start, stop)]
    return torch.cat(parts)


def divergences(dense: Tensor, logs: Tensor) -> Tensor:
    """Kullback-Leibler divergence [N] from `dense`, in nats; both are log-probabilities [N, classes]."""
    return (dense.exp() * (dense - logs)).sum(1)


def check_fitness(fitness: Fitness, images: TimmImages, model: nn.Module) -> None:
    """Raise `InputError` where `fitness` needs labels, and those of the images are missing or none of the model's."""
    if fitness in NEEDS_LABELS:
        others = "use --fitness distance or agreement, or one folder for each class"
        check_labelled(images, model, f"which the fitness {fitness} needs; {others}")


def check_labelled(images: TimmImages, model: nn.Module, why: str) -> None:
    """Raise `InputError` where labels are missing, which `why` explains, or are none of the model's."""
    if not len(images):
        raise InputError(f"{images.text} holds no images to select on.")
    labels = images.labels()
    if (labels < 0).any():
        raise InputError(f"{images.text} has no labels, {why}.")
    check_labels(labels, cast(int, model.num_classes), f"{images.text} has")


class SubnetScores:
    """Per-image scores of subnets of one supernet; candidates are spread over the processes, never images."""

    def __init__(
        self, supernet: nn.Module, images: SelectionImages, *, fitness: Fitness, dense: nn.Module | None = None
    ) -> None:
        self.supernet, self.images, self.fitness = supernet, images, fitness
        check_fitness(fitness, images.source, supernet)
        self._labels = torch.cat([labels for _, labels in images.batches()])
        self._dense: Tensor | None = None
        if fitness not in NEEDS_LABELS:
            if dense is None:
                raise InputError(f"The fitness {fitness} compares with the dense model, which is missing.")
            self._dense = log_probabilities(dense, images)

    def __call__(self, configs: Sequence[Mapping[str, Rank]], start: int, stop: int) -> list[np.ndarray]:
        """For each config the scores float32 [stop - start], higher is better."""
        return spread(configs, lambda ranks: self._scores(ranks, start, stop))

    def _scores(self, ranks: Mapping[str, Rank], start: int, stop: int) -> np.ndarray:
        with active_ranks(self.supernet, ranks):
            logs = log_probabilities(self.supernet, self.images, start, stop)
        labels = self._labels[start:stop]
        if self.fitness == "top1":
            scores = (logs.argmax(1) == labels).float()
        elif self.fitness == "loss":
            scores = logs.gather(1, labels[:, None])[:, 0]
        else:
            assert self._dense is not None
            dense = self._dense[start:stop]
            scores = (
                (logs.argmax(1) == dense.argmax(1)).float()
                if self.fitness == "agreement"
                else -divergences(dense, logs)
            )
        return scores.numpy().astype(np.float32)
