"""Mean and second moment of what each layer receives, over calibration images.

Streamed: a batch adds its sums and is gone, so memory does not depend on the number of images. Products are taken in
single precision about the mean of the first batch, and summed in float64. A layer of `n` inputs needs an `n x n`
float64 matrix; `layer_groups` splits a large model's layers so that one pass over the images serves each group.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flora.errors import InputError, few
from flora.ranks.cost import LayerShape


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """Moments of a layer's input over `tokens` rows: `mean` [in] and `second_moment` E[x x^T] [in, in], float64."""

    tokens: int
    mean: Tensor
    second_moment: Tensor

    @property
    def covariance(self) -> Tensor:
        """Centred second moment [in, in]."""
        return self.second_moment - torch.outer(self.mean, self.mean)


class _Sums:
    """Running sums over the rows that a layer receives, less the mean of its first batch."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.tokens = 0
        self.total = torch.zeros(features, dtype=torch.float64, device=device)
        self.products = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.shift: Tensor | None = None

    def add(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().flatten(end_dim=-2).float()  # [B * N, in]
        if self.shift is None:
            self.shift = rows.mean(0)
        rows = rows - self.shift
        self.tokens += len(rows)
        self.total += rows.sum(0, dtype=torch.float64)
        self.products += rows.T @ rows

    def statistics(self) -> "InputStatistics":
        """Of the inputs themselves: the shift, which only keeps the products precise, is taken out again."""
        assert self.shift is not None
        shift, shifted_mean = self.shift.double(), self.total / self.tokens
        mean = shift + shifted_mean
        covariance = self.products / self.tokens - torch.outer(shifted_mean, shifted_mean)
        return InputStatistics(tokens=self.tokens, mean=mean, second_moment=covariance + torch.outer(mean, mean))


@torch.no_grad()
def collect_statistics(
    model: nn.Module, batches: Iterable[Tensor], layers: Mapping[str, nn.Linear]
) -> dict[str, InputStatistics]:
    """Run `batches` of images [B, C, H, W] through `model` and return the statistics of what each of `layers` receives.

    Raises `InputError` when there are no images, and naming the layer when an activation is not finite.
    """
    device = next(model.parameters()).device
    sums = {name: _Sums(layer.in_features, device) for name, layer in layers.items()}
    hooks = [layer.register_forward_pre_hook(sums[name].add) for name, layer in layers.items()]
    training = model.training
    model.eval()
    try:
        for images in batches:
            model(images.to(device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if any(part.tokens == 0 for part in sums.values()):
        raise InputError("There are no calibration images; give a data set that holds some.")
    if broken := [name for name, part in sums.items() if not part.products.isfinite().all()]:
        raise InputError(f"The input of {few(broken)} is not finite on the calibration images; check the checkpoint.")
    return {name: part.statistics() for name, part in sums.items()}


def layer_groups(shapes: Iterable[LayerShape], most_bytes: int = 2**29) -> Iterator[list[str]]:
    """Names of layers in groups whose second moments together take at most `most_bytes` (one layer at the least)."""
    group: list[str] = []
    size = 0
    for shape in shapes:
        needed = 8 * shape.in_features**2
        if group and size + needed > most_bytes:
            yield group
            group, size = [], 0
        group.append(shape.name)
        size += needed
    if group:
        yield group
