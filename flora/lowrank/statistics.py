"""Mean and second moment of what each layer receives, over calibration images.

Streamed: a batch adds its sums and is gone, so memory does not depend on the number of images. Products are taken in
single precision about the mean of the first batch, and summed in float64. A layer of `n` inputs needs an `n x n`
float64 matrix; `layer_groups` splits a large model's layers so that one pass over the images serves each group.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flora.errors import InputError, few
from flora.lowrank.hooks import removed_after
from flora.ranks.cost import LayerShape

# A backward pass keeps the activations of all its images; two need less memory than a large model's weights.
IMAGES_OF_A_GRADIENT = 2
# Where nothing depends on any token all weigh the same.
SMALLEST_WEIGHT = 1e-10


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


class InputSums:
    """Running sums over the rows that a layer receives, less the mean of its first batch, each row with a weight."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.tokens = 0
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(features, dtype=torch.float64, device=device)
        self.products = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.shift: Tensor | None = None

    def add(self, inputs: Tensor, weights: Tensor | None = None) -> Tensor:
        """Take in `inputs` [..., in] with `weights` [...], or all with the weight one.

        Returns the weighted rows [N, in], less the shift.
        """
        rows = inputs.detach().flatten(end_dim=-2).float()  # [B * N, in]
        if self.shift is None:
            self.shift = rows.mean(0)
        rows = rows - self.shift
        if weights is None:
            weights = torch.ones_like(rows[:, 0])
        weights = weights.flatten().float()
        weighted = rows * weights[:, None]
        self.tokens += len(rows)
        self.weight += weights.sum(dtype=torch.float64)
        self.total += weighted.sum(0, dtype=torch.float64)
        self.products += rows.T @ weighted
        return weighted

    def statistics(self) -> InputStatistics:
        """Of the inputs themselves: the shift, which only keeps the products precise, is taken out again."""
        assert self.shift is not None
        shifted_mean = self.total / self.weight
        mean = self.shift.double() + shifted_mean
        covariance = self.products / self.weight - torch.outer(shifted_mean, shifted_mean)
        return InputStatistics(tokens=self.tokens, mean=mean, second_moment=covariance + torch.outer(mean, mean))


def collect_statistics(
    model: nn.Module, batches: Iterable[Tensor], layers: Mapping[str, nn.Linear], *, weigh_tokens: bool = False
) -> dict[str, InputStatistics]:
    """Run `batches` of images [B, C, H, W] through `model` and return the statistics of what each of `layers` receives.

    With `weigh_tokens` a token counts by how much the model's answer depends on the layer's output there (see
    `_with_weights`); the model must give logits [B, classes]. Raises `InputError` when there are no images, and naming
    the layer when an activation is not finite.
    """
    device = next(model.parameters()).device
    sums = {name: InputSums(layer.in_features, device) for name, layer in layers.items()}
    draw = torch.Generator().manual_seed(0)
    with frozen(model):
        for images in batches:
            if weigh_tokens:
                for few_images in images.to(device).split(IMAGES_OF_A_GRADIENT):
                    for name, (inputs, weight) in _with_weights(model, few_images, layers, draw).items():
                        sums[name].add(inputs, weight)
            else:
                _add_plain(model, images.to(device), layers, sums)
    if any(part.tokens == 0 for part in sums.values()):
        raise InputError("There are no calibration images; give a data set that holds some.")
    if broken := [name for name, part in sums.items() if not part.products.isfinite().all()]:
        raise InputError(f"The input of {few(broken)} is not finite on the calibration images; check the checkpoint.")
    return {name: part.statistics() for name, part in sums.items()}


@torch.no_grad()
def _add_plain(
    model: nn.Module, images: Tensor, layers: Mapping[str, nn.Linear], sums: Mapping[str, InputSums]
) -> None:
    for name, (inputs, _) in _forward(model, images, layers)[1].items():
        sums[name].add(inputs)


@torch.enable_grad()
def _with_weights(
    model: nn.Module, images: Tensor, layers: Mapping[str, nn.Linear], draw: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """What each layer receives from `images`, and the weights of its tokens: ||dL/dy||, y being its output at one.

    L is the model's own log-likelihood of a label drawn from its prediction, so no labels are needed. To first order,
    a change of y moves L by at most sum ||dL/dy|| ||dy|| <= sqrt(sum ||dL/dy||) sqrt(sum ||dL/dy|| ||dy||^2), and the
    last factor is what the weighted statistics let a factorization minimize. Tokens that the classifier never looks at,
    such as patches in a last block that is read at the class token, weigh nothing.
    """
    logits, seen = _forward(model, images.requires_grad_(), layers)
    if logits.ndim != 2:
        raise InputError(f"A classifier gives logits [images, classes], this model gives {list(logits.shape)}.")
    likelihoods = logits.float().log_softmax(-1)
    if likelihoods.isfinite().all():
        labels = torch.multinomial(likelihoods.detach().exp().cpu(), 1, generator=draw).to(logits.device)
        outputs = [output for _, output in seen.values()]
        gradients = torch.autograd.grad(likelihoods.gather(1, labels).sum(), outputs, materialize_grads=True)
        weights = [gradient.float().norm(dim=-1) + SMALLEST_WEIGHT for gradient in gradients]
    else:
        weights = [torch.ones_like(output[..., 0]) for _, output in seen.values()]
    return {name: (inputs, weight) for (name, (inputs, _)), weight in zip(seen.items(), weights, strict=True)}


def token_weights(
    model: nn.Module, batches: Iterable[Tensor], layers: Mapping[str, nn.Linear]
) -> dict[str, list[Tensor]]:
    """For each layer and batch of images the weights of its tokens, as `collect_statistics` weighs them."""
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    draw = torch.Generator().manual_seed(0)
    with frozen(model):
        for images in batches:
            # Of a pass the weights alone are kept: all inputs, with their graph, are gone before the next.
            parts = [
                {
                    name: weight.detach().cpu().flatten()
                    for name, (_, weight) in _with_weights(model, few_images, layers, draw).items()
                }
                for few_images in images.to(device).split(IMAGES_OF_A_GRADIENT)
            ]
            for name, weights in found.items():
                weights.append(torch.cat([part[name] for part in parts]))
    return found


def _forward(
    model: nn.Module, images: Tensor, layers: Mapping[str, nn.Linear]
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The model's output, and the input and output of each layer on the way."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(name: str):
        return lambda layer, inputs, output: seen.update({name: (inputs[0], output)})

    hooks = [layer.register_forward_hook(remember(name)) for name, layer in layers.items()]
    with removed_after(hooks):
        return model(images), seen


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and its parameters without gradients inside the block, as they were behind it."""
    training = model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)


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
