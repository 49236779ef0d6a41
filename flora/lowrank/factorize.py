"""A linear layer as two nested factors: one decomposition that holds every rank.

Both methods return `down` [f, in] and `up` [out, f], f the full rank, with components in order of importance: the first
r rows of `down` and columns of `up` are the rank-r layer, and at r = f the product is the dense weight.

* `svd` is the released code's start: the SVD of the weight alone, singular values on the side of the smaller dimension.
* `activation` is optimal for the layer's output on the calibration tokens, weighted as the statistics weigh them: with
  C the covariance of the inputs, `up` holds the eigenvectors of W C W^T and `down = up^T W`, so that a rank drops
  exactly the smallest eigenvalues. The mean m of the inputs passes untouched: y = up_r down_r (x - m) + (W m + b). A
  layer without a bias stays without one: its C is the second moment about zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flora.lowrank.statistics import InputStatistics


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Nested factors of one layer, and the energy of each component in descending order.

    `spectrum` [f]: squared singular values (`svd`), or the output variance that a component carries (`activation`);
    the energy discarded at rank r is `spectrum[r:].sum()`.
    """

    down: Tensor
    up: Tensor
    inner_bias: Tensor | None
    bias: Tensor | None
    spectrum: Tensor


def factorize_svd(layer: nn.Linear) -> Factors:
    """Factors from the SVD of the weight (Eckart-Young: best in the Frobenius norm at every rank)."""
    left, singular, right = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    wide_input = layer.in_features > layer.out_features
    up, down = (left * singular, right) if wide_input else (left, singular[:, None] * right)
    return _factors(layer, down, up, None, layer.bias, singular.square())


def factorize_activation(layer: nn.Linear, statistics: InputStatistics) -> Factors:
    """Factors with the least expected squared output error at every rank, over the tokens of `statistics`."""
    weight = layer.weight.detach().double()
    mean = None if layer.bias is None else statistics.mean
    moment = statistics.second_moment if mean is None else statistics.covariance
    up, down, energies = nested_factors(weight, moment)
    return _factors(
        layer,
        down,
        up,
        None if mean is None else -(down @ mean),
        None if mean is None else weight @ mean + layer.bias.detach().double(),
        energies,
    )


def nested_factors(weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`up` [out, f] and `down` [f, in] of a matrix [out, in] for inputs of this moment [in, in], and energies [f].

    `up` holds the eigenvectors of W C W^T, the largest first, and `down` = `up`^T W.
    """
    # With more outputs than inputs W has rank `in`: work in an orthonormal basis of its column space.
    basis, core = torch.linalg.qr(weight) if len(weight) > weight.shape[1] else (None, weight)
    energies, vectors = torch.linalg.eigh(core @ moment @ core.T)
    vectors = vectors.flip(1)  # eigh sorts upwards
    return vectors if basis is None else basis @ vectors, vectors.T @ core, energies.flip(0).clamp(min=0)


def _factors(
    layer: nn.Linear, down: Tensor, up: Tensor, inner_bias: Tensor | None, bias: Tensor | None, spectrum: Tensor
) -> Factors:
    def stored(tensor: Tensor) -> Tensor:
        return tensor.detach().to(layer.weight.dtype).contiguous()

    return Factors(
        down=stored(down),
        up=stored(up),
        inner_bias=None if inner_bias is None else stored(inner_bias),
        bias=None if bias is None else stored(bias),
        spectrum=stored(spectrum),
    )
