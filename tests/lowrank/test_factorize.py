"""Factors: full rank is the dense layer, and what a rank loses is the discarded part of the spectrum."""

import pytest
import torch
from torch import Tensor, nn

from flora.lowrank.factorize import Factors, factorize_activation, factorize_svd
from flora.lowrank.statistics import InputStatistics

SHAPES = [(12, 30), (30, 12), (16, 16)]
TOKENS = 200


def _layer(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias).double()


def _rows(features: int, tokens: int = TOKENS) -> Tensor:
    """Correlated inputs with a mean, as after a LayerNorm with weight and bias."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    mix *= 0.8 ** torch.arange(features)
    return torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ mix.T + mix.sum(1)


def _statistics(rows: Tensor) -> InputStatistics:
    return InputStatistics(tokens=len(rows), mean=rows.mean(0), second_moment=rows.T @ rows / len(rows))


def _apply(factors: Factors, rows: Tensor, rank: int) -> Tensor:
    hidden = rows @ factors.down[:rank].T
    if factors.inner_bias is not None:
        hidden = hidden + factors.inner_bias[:rank]
    output = hidden @ factors.up[:, :rank].T
    return output if factors.bias is None else output + factors.bias


def _output_error(factors: Factors, layer: nn.Linear, rows: Tensor, rank: int) -> float:
    """Squared error of a token's output, summed over features, in the mean over `rows`."""
    return (_apply(factors, rows, rank) - layer(rows)).square().sum(1).mean().item()


def _ranks(layer: nn.Linear) -> list[int]:
    full_rank = min(layer.in_features, layer.out_features)
    return [1, 2, full_rank // 2, full_rank - 1, full_rank]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["svd", "activation"])
def test_full_rank_equals_dense_on_any_input(method: str, shape: tuple[int, int], bias: bool):
    layer, rows = _layer(*shape, bias=bias), _rows(shape[0])
    factors = factorize_svd(layer) if method == "svd" else factorize_activation(layer, _statistics(rows))
    others = torch.randn(50, shape[0], dtype=torch.float64)
    assert torch.allclose(_apply(factors, others, min(shape)), layer(others), atol=1e-10)
    assert torch.allclose(factors.up @ factors.down, layer.weight, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_equals_dense_with_fewer_tokens_than_features(shape: tuple[int, int]):
    layer = _layer(*shape)
    factors = factorize_activation(layer, _statistics(_rows(shape[0], tokens=5)))
    others = torch.randn(50, shape[0], dtype=torch.float64)
    assert torch.allclose(_apply(factors, others, min(shape)), layer(others), atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_with_fewer_tokens_than_features_the_rank_of_the_tokens_loses_nothing_on_them(shape: tuple[int, int]):
    layer, rows = _layer(*shape), _rows(shape[0], tokens=5)
    factors = factorize_activation(layer, _statistics(rows))
    assert _output_error(factors, layer, rows, rank=4) < 1e-10  # five tokens around their mean span four directions


@pytest.mark.parametrize("method", ["svd", "activation"])
def test_full_rank_of_a_rank_deficient_weight_equals_dense(method: str):
    layer, rows = _layer(12, 30), _rows(12)
    with torch.no_grad():
        layer.weight[:, 3:] = 0
    factors = factorize_svd(layer) if method == "svd" else factorize_activation(layer, _statistics(rows))
    assert torch.allclose(_apply(factors, rows, 12), layer(rows), atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_truncation_error_is_the_discarded_energy(shape: tuple[int, int]):
    layer = _layer(*shape)
    factors = factorize_svd(layer)
    for rank in _ranks(layer):
        error = (factors.up[:, :rank] @ factors.down[:rank] - layer.weight).square().sum()
        assert error.item() == pytest.approx(factors.spectrum[rank:].sum().item(), abs=1e-12)


@pytest.mark.parametrize("shape", [(12, 36), (12, 48), (16, 16)])
def test_svd_keeps_singular_values_on_the_input_side_of_a_widening_layer(shape: tuple[int, int]):
    factors = factorize_svd(_layer(*shape))
    assert torch.allclose(factors.up.T @ factors.up, torch.eye(shape[0], dtype=torch.float64))
    assert torch.allclose(factors.down @ factors.down.T, factors.spectrum.diag())


def test_svd_keeps_singular_values_on_the_output_side_of_a_narrowing_layer():
    factors = factorize_svd(_layer(48, 12))
    assert torch.allclose(factors.down @ factors.down.T, torch.eye(12, dtype=torch.float64))
    assert torch.allclose(factors.up.T @ factors.up, factors.spectrum.diag())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_activation_output_error_on_the_tokens_is_the_discarded_spectrum(shape: tuple[int, int], bias: bool):
    layer, rows = _layer(*shape, bias=bias), _rows(shape[0])
    factors = factorize_activation(layer, _statistics(rows))
    scale = factors.spectrum.sum().item()
    for rank in _ranks(layer):
        error = _output_error(factors, layer, rows, rank)
        assert error == pytest.approx(factors.spectrum[rank:].sum().item(), rel=1e-6, abs=1e-9 * scale)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_activation_is_never_worse_than_svd_on_the_tokens(shape: tuple[int, int], bias: bool):
    layer, rows = _layer(*shape, bias=bias), _rows(shape[0])
    activation, svd = factorize_activation(layer, _statistics(rows)), factorize_svd(layer)
    for rank in _ranks(layer)[:-1]:
        assert _output_error(activation, layer, rows, rank) < _output_error(svd, layer, rows, rank)


def test_the_mean_of_the_tokens_passes_untouched_at_every_rank():
    layer, rows = _layer(12, 30), _rows(12)
    factors = factorize_activation(layer, _statistics(rows))
    for rank in _ranks(layer):
        assert torch.allclose(_apply(factors, rows.mean(0), rank), layer(rows.mean(0)))


def test_a_layer_without_bias_keeps_none():
    layer, rows = _layer(12, 30, bias=False), _rows(12)
    for factors in (factorize_svd(layer), factorize_activation(layer, _statistics(rows))):
        assert (factors.bias, factors.inner_bias) == (None, None)


@pytest.mark.parametrize("method", ["svd", "activation"])
def test_the_spectrum_descends_and_has_no_negative_part(method: str):
    layer, rows = _layer(12, 30), _rows(12, tokens=5)
    factors = factorize_svd(layer) if method == "svd" else factorize_activation(layer, _statistics(rows))
    assert len(factors.spectrum) == 12
    assert (factors.spectrum >= 0).all()
    assert (factors.spectrum.diff() <= 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_activation_prefixes_are_nested_projections(shape: tuple[int, int]):
    """A smaller rank is the projection of a larger one: cutting in two steps equals cutting at once."""
    layer, rows = _layer(*shape), _rows(shape[0])
    factors = factorize_activation(layer, _statistics(rows))
    larger = factors.up[:, :8] @ factors.down[:8]
    smaller = factors.up[:, :3] @ factors.down[:3]
    assert torch.allclose(factors.up[:, :3] @ factors.up[:, :3].T @ larger, smaller, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_prefixes_are_nested_best_approximations(shape: tuple[int, int]):
    """The best rank 3 of the best rank 8 is the best rank 3."""
    layer = _layer(*shape)
    factors = factorize_svd(layer)
    with torch.no_grad():
        layer.weight.copy_(factors.up[:, :8] @ factors.down[:8])
    again = factorize_svd(layer)
    assert torch.allclose(again.up[:, :3] @ again.down[:3], factors.up[:, :3] @ factors.down[:3], atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_factors_have_the_precision_of_the_weight(dtype: torch.dtype):
    layer, rows = _layer(12, 30), _rows(12)
    statistics = _statistics(rows)
    layer.to(dtype)
    for factors in (factorize_svd(layer), factorize_activation(layer, statistics)):
        assert {factors.down.dtype, factors.up.dtype, factors.bias.dtype} == {dtype}
