"""Compensation: the factors of a compact model fitted again to what its layers really receive, layer after layer.

Factors are made for the dense model's activations, but a layer of a compact model receives what the compressed layers
before it have left. Here each layer, in the order of execution, gets the factors of its rank that come nearest to the
output that is wanted of it, given the inputs that it has. Where its output is added to a residual stream, what is
wanted is the dense model's stream, so that the layer also makes good for the errors that have gathered there.

With x the inputs, z the wanted outputs, C = E[x x^T] and K = E[z x^T], both centred and each token weighted as for the
first factors, the best matrix is M = K C^-1, and its best part of rank r is U_r U_r^T M with U the eigenvectors of
M C M^T. Few images must not lead far away from the layer W that was trained: M minimizes the error plus
lambda ||M - W||^2, so M = W + (K - W C) (C + lambda)^-1, with lambda = tr(C) / (effective number of tokens).
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flora.lowrank.factorize import nested_factors
from flora.lowrank.hooks import StopForwardError, removed_after
from flora.lowrank.materialize import factors_of
from flora.lowrank.replay import Replay
from flora.lowrank.statistics import InputSums, frozen, token_weights
from flora.lowrank.targets import linear_layers
from flora.ranks.space import block_name, blocks_of

Batches = Callable[[], Iterable[Tensor]]
# The error of products in single precision, and the least damping where inputs are zero.
ROUNDING, SMALLEST = 1e-6, 1e-9


def compensate(
    compact: nn.Module,
    dense: nn.Module,
    layers: Sequence[str],
    batches: Batches,
    *,
    on_layer: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Fit those of `layers` that are factorized in `compact` anew, in place; ranks and shapes stay.

    `layers` are in the order of execution; `batches` gives the calibration images [B, C, H, W], the same each time.
    `on_layer` gets how many are done, of how many.
    """
    pairs = [name for name in layers if isinstance(compact.get_submodule(name), nn.Sequential)]
    if not pairs:
        return
    dense_layers = linear_layers(dense, pairs)
    weights = token_weights(dense, batches(), dense_layers)
    names = blocks_of(layers)
    blocks = [block_name(block[0]) for block in names]
    replays = [Replay(model, blocks, batches, stops=True) for model in (compact, dense)]
    device, done = next(compact.parameters()).device, 0
    with frozen(compact), frozen(dense):
        for place, block in enumerate(names):
            for replay in replays:
                replay.move_to(place)
            for name in (name for name in block if name in pairs):
                images = next(iter(batches())).to(device)
                stream = _stream(compact, replays[0], images, blocks[place], name)
                sums = _Sums(dense_layers[name].in_features, dense_layers[name].out_features, device)
                with replays[0].active(), replays[1].active():
                    for images, weight in zip(batches(), weights[name], strict=True):
                        wanted = _seen(dense, images.to(device), name, stream)
                        found = _seen(compact, images.to(device), name, stream)
                        sums.add(found.x, _target(found, wanted), weight)
                _fit(*factors_of(compact.get_submodule(name)), dense_layers[name].weight, sums)
                done += 1
                on_layer(done, len(pairs))


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """Where a layer's output can be seen once it is added to the residual stream: what enters or leaves a module."""

    module: str
    enters: bool


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Input and output of a layer, and the stream behind it, which depends on the output alone where it has a graph."""

    x: Tensor
    y: Tensor
    stream: Tensor | None


def _seen(model: nn.Module, images: Tensor, name: str, stream: _Stream | None) -> _Seen:
    """Run the frozen `model` up to what is asked for."""
    seen: dict[str, Tensor] = {}

    def at_layer(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.update(x=args[0].detach(), y=output.detach().requires_grad_())
        if stream is None:
            raise StopForwardError
        return seen["y"]

    def at_stream(value: Tensor) -> None:
        if "y" in seen:
            seen["stream"] = value
            raise StopForwardError

    hooks = [model.get_submodule(name).register_forward_hook(at_layer)]
    if stream is not None:
        module = model.get_submodule(stream.module)
        if stream.enters:
            hooks.append(module.register_forward_pre_hook(lambda module, args: at_stream(args[0])))
        else:
            hooks.append(module.register_forward_hook(lambda module, args, output: at_stream(output)))
    with removed_after(hooks), torch.enable_grad(), suppress(StopForwardError):
        model(images)
    return _Seen(x=seen["x"], y=seen["y"], stream=seen.get("stream"))


def _target(found: _Seen, wanted: _Seen) -> Tensor:
    """The output with which the stream would be the wanted one; without a stream, the wanted output."""
    if found.stream is None or wanted.stream is None:
        return wanted.y.detach()
    scale, missing = (
        torch.autograd.grad(found.stream, found.y, direction, retain_graph=True)[0]
        for direction in (torch.ones_like(found.stream), (wanted.stream - found.stream).detach())
    )
    return found.y.detach() + missing / scale.square()


def _stream(model: nn.Module, replay: Replay, images: Tensor, block: str, name: str) -> _Stream | None:
    """Where the residual stream behind layer `name` can be seen in its block, None where it cannot.

    There each number is one of the layer's outputs, times a scale, plus what does not depend on the layer. That is
    tried with a random direction, for what enters the block's parts and what leaves the block; the last place counts.
    `model` is frozen.
    """
    found: list[tuple[_Stream, Tensor]] = []
    output: list[Tensor] = []

    def at_layer(module: nn.Module, args: object, y: Tensor) -> Tensor:
        output.append(y.detach().requires_grad_())
        return output[0]

    def note(stream: _Stream, value: Tensor) -> None:
        if output and value.numel() == output[0].numel() and value.requires_grad:
            found.append((stream, value))

    hooks = [model.get_submodule(name).register_forward_hook(at_layer)]
    for child, part in model.get_submodule(block).named_children():
        place = _Stream(module=f"{block}.{child}", enters=True)
        hooks.append(part.register_forward_pre_hook(lambda module, args, place=place: note(place, args[0])))
    whole = _Stream(module=block, enters=False)

    def at_end(module: nn.Module, args: object, out: Tensor) -> None:
        note(whole, out)
        raise StopForwardError

    hooks.append(model.get_submodule(block).register_forward_hook(at_end))
    with removed_after(hooks), replay.active(), torch.enable_grad(), suppress(StopForwardError):
        model(images)
    draw = torch.Generator().manual_seed(0)
    for stream, value in reversed(found):
        direction = torch.randn(value.shape, generator=draw).to(value)
        scale, back = (
            torch.autograd.grad(value, output[0], each, retain_graph=True)[0]
            for each in (torch.ones_like(value), direction)
        )
        if scale.all() and torch.isclose((back / scale).norm(), direction.norm(), rtol=1e-4):
            return stream
    return None


class _Sums:
    """Weighted moments of inputs x [..., in] and wanted outputs z [..., out], about the means of the first batch."""

    def __init__(self, in_features: int, out_features: int, device: torch.device) -> None:
        self.inputs = InputSums(in_features, device)
        self._squared_weight = torch.zeros((), dtype=torch.float64, device=device)
        self._total = torch.zeros(out_features, dtype=torch.float64, device=device)
        self._products = torch.zeros(out_features, in_features, dtype=torch.float64, device=device)
        self._shift: Tensor | None = None

    def add(self, x: Tensor, z: Tensor, weights: Tensor) -> None:
        """Take in one batch with `weights` [...]."""
        weights = weights.flatten().to(x)
        weighted = self.inputs.add(x, weights)
        z = z.flatten(end_dim=-2).float()
        if self._shift is None:
            self._shift = z.mean(0)
        z = z - self._shift
        self._squared_weight += weights.square().sum(dtype=torch.float64)
        self._total += (z * weights[:, None]).sum(0, dtype=torch.float64)
        self._products += z.T @ weighted

    @property
    def effective_tokens(self) -> float:
        """So many tokens of equal weight would say as much."""
        return (self.inputs.weight.square() / self._squared_weight).item()

    @property
    def rounding(self) -> float:
        """Differences of variances below this one mean nothing."""
        return (ROUNDING * self.inputs.products.trace() / self.inputs.weight).item() + SMALLEST

    def means(self) -> tuple[Tensor, Tensor]:
        """Those of x [in] and z [out], float64."""
        assert self._shift is not None
        return self.inputs.statistics().mean, self._shift + self._total / self.inputs.weight

    def covariances(self) -> tuple[Tensor, Tensor]:
        """E[x x^T] [in, in] and E[z x^T] [out, in], centred, float64."""
        weight = self.inputs.weight
        centred = self._products / weight - torch.outer(self._total / weight, self.inputs.total / weight)
        return self.inputs.statistics().covariance, centred


@torch.no_grad()
def _fit(down: nn.Linear, up: nn.Linear, dense_weight: Tensor, sums: _Sums) -> None:
    """Give `down` and `up` the factors and the bias that come nearest to what is wanted."""
    (x, z), (c, k) = sums.means(), sums.covariances()
    if up.bias is None:  # then the means must go through the factors, too
        c, k = c + torch.outer(x, x), k + torch.outer(z, x)
    strength = c.trace().clamp(min=0) / sums.effective_tokens + sums.rounding
    damped = torch.linalg.cholesky(c + strength * torch.eye(len(c)).to(c))
    weight = dense_weight.double()
    best = weight + torch.cholesky_solve((k - weight @ c).T, damped).T
    second, first, _ = nested_factors(best, c)
    rank = len(down.weight)
    down.weight.copy_(first[:rank])
    up.weight.copy_(second[:, :rank])
    if up.bias is not None:
        up.bias.copy_(z - second[:, :rank] @ (first[:rank] @ x))
