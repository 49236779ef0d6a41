"""An elastic layer trains and runs its first components only, and its state is its weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flora.errors import InputError
from flora.lowrank.elastic import ElasticLinear
from flora.lowrank.factorize import Factors

IN, OUT, FULL = 12, 30, 12
BREAK_EVEN = 9  # 9 * 42 >= 360 > 8 * 42


def _layer(*, inner_bias: bool = True) -> ElasticLinear:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return ElasticLinear(
        Factors(
            down=normal(FULL, IN),
            up=normal(OUT, FULL),
            inner_bias=normal(FULL) if inner_bias else None,
            bias=normal(OUT) if inner_bias else None,
            spectrum=torch.ones(FULL),
        )
    )


def _rows() -> Tensor:
    return torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 5, BREAK_EVEN - 1, BREAK_EVEN, FULL - 1, FULL])
@pytest.mark.parametrize("inner_bias", [True, False])
def test_a_rank_runs_the_first_components(rank: int, inner_bias: bool):
    layer, rows = _layer(inner_bias=inner_bias), _rows()
    layer.set_rank(rank)
    hidden = F.linear(rows, layer.down[:rank], layer.inner_bias[:rank] if inner_bias else None)
    assert torch.allclose(layer(rows), F.linear(hidden, layer.up[:, :rank], layer.bias))


@pytest.mark.parametrize("rank", [1, 5, BREAK_EVEN, FULL - 1])
def test_components_outside_the_active_rank_get_no_gradient_and_those_inside_do(rank: int):
    layer = _layer()
    layer.set_rank(rank)
    layer(_rows()).square().sum().backward()
    by_component = {"down": layer.down.grad, "up": layer.up.grad.T, "inner_bias": layer.inner_bias.grad[:, None]}
    for name, gradient in by_component.items():
        assert (gradient[rank:] == 0).all(), name
        assert (gradient[:rank] != 0).any(dim=1).all(), name
    assert (layer.bias.grad != 0).all()


def test_the_factors_are_multiplied_first_from_break_even_on():
    layer = _layer()
    factored = []
    for rank in range(1, FULL + 1):
        layer.set_rank(rank)
        factored.append(layer.is_factored)
    assert factored == [rank < BREAK_EVEN for rank in range(1, FULL + 1)]


def test_the_state_dict_holds_weights_only():
    layer = _layer()
    at_full_rank = layer.state_dict()
    layer.set_rank(3)
    assert set(at_full_rank) == {"down", "up", "inner_bias", "bias"}
    assert all(torch.equal(tensor, at_full_rank[name]) for name, tensor in layer.state_dict().items())
    assert set(_layer(inner_bias=False).state_dict()) == {"down", "up"}


def test_dense_is_the_full_rank():
    layer = _layer()
    layer.set_rank(3)
    layer.set_rank("dense")
    assert layer.rank == FULL


@pytest.mark.parametrize("rank", [-1, 0, FULL + 1])
def test_a_rank_out_of_bounds_is_refused_and_changes_nothing(rank: int):
    layer = _layer()
    layer.set_rank(3)
    with pytest.raises(InputError, match=f"between 1 and {FULL}.*{rank}"):
        layer.set_rank(rank)
    assert layer.rank == 3


def test_a_copy_has_its_own_rank_and_weights():
    layer, rows = _layer(), _rows()
    layer.set_rank(5)
    other = copy.deepcopy(layer)
    assert torch.equal(other(rows), layer(rows))
    other.set_rank(2)
    with torch.no_grad():
        other.down.zero_()
    assert layer.rank == 5
    assert (layer.down != 0).all()


def test_moving_to_another_precision_after_a_rank_was_set_keeps_the_rank():
    layer, rows = _layer(), _rows()
    layer.set_rank(4)
    expected = layer(rows)
    assert torch.allclose(layer.float()(rows.float()), expected.float(), atol=1e-4)
