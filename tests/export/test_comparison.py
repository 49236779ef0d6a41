"""The figures of a comparison equal independent computations of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from export.comparison import Comparison, compare


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((50, 11)).astype(np.float32) * 4
    return reference, reference + rng.standard_normal(reference.shape).astype(np.float32)


def test_figures_equal_those_of_torch(pair):
    reference, logits = (torch.from_numpy(values).double() for values in pair)
    figures = compare(*pair)
    kl = F.kl_div(logits.log_softmax(1), reference.log_softmax(1), log_target=True, reduction="none").sum(1)
    np.testing.assert_allclose(figures.kl, kl.numpy(), rtol=1e-9)
    np.testing.assert_allclose(figures.cosine, F.cosine_similarity(reference, logits).numpy(), rtol=1e-9)
    assert figures.agrees.mean() == (reference.argmax(1) == logits.argmax(1)).double().mean().item()
    assert figures.max_abs.max() == (reference - logits).abs().max().item()
    assert figures.max_relative == pytest.approx(figures.max_abs.max() / reference.abs().max().item())


def test_a_set_in_parts_equals_the_whole(pair):
    reference, logits = pair
    parts = [compare(reference[i : i + 7], logits[i : i + 7]) for i in range(0, 50, 7)]
    whole = compare(reference, logits)
    for name in Comparison.__annotations__:
        np.testing.assert_allclose(getattr(Comparison.joined(parts), name), getattr(whole, name), rtol=1e-12)


def test_equal_logits_do_not_differ_and_scaled_ones_do_in_kl_alone(pair):
    same, scaled = compare(pair[0], pair[0]), compare(pair[0], 2 * pair[0])
    assert same.kl.max() == same.max_abs.max() == 0
    assert scaled.agrees.all()
    np.testing.assert_allclose(scaled.cosine, 1)
    assert (scaled.kl > 0).all()


def test_logits_of_any_size_give_finite_figures():
    rows = np.array([[0.0, 0.0], [1e30, -1e30], [0.0, 0.0], [-1e4, 1e4]])
    others = np.array([[0.0, 0.0], [-1e30, 1e30], [1.0, 2.0], [1e4, -1e4]])
    figures = compare(rows, others)
    assert all(np.isfinite(getattr(figures, name)).all() for name in Comparison.__annotations__)
    np.testing.assert_allclose(figures.cosine, [1, -1, 0, -1])
    assert figures.kl[3] == pytest.approx(2e4)
