"""Probes: one layer is cut alone, and the divergence is that of a plain model cut there."""

from pathlib import Path

import pytest
import torch
from torch import nn

from flora.lowrank.materialize import materialize
from flora.ranks.sensitivity import LayerSensitivity, probe_rank
from flora.training import sensitivity
from flora.training.data import TimmImages
from flora.training.selection import SelectionImages, log_probabilities
from flora.training.sensitivity import probe_layers
from tests.samples import GREY

TWO_FAMILIES = pytest.mark.parametrize("family_supernet", ["vit", "swin"], indirect=True)


@pytest.fixture
def images(image_folder: Path) -> SelectionImages:
    """Twelve images in three batches."""
    return SelectionImages(TimmImages(f"{image_folder},limit=12", GREY), batch_size=5)


@TWO_FAMILIES
def test_a_probe_is_the_divergence_of_the_model_materialized_at_it(family_supernet, images):
    dense, supernet, cost = family_supernet
    probes = probe_layers(supernet, dense, cost, images, known={})
    assert list(probes) == list(cost.shapes)
    wanted = log_probabilities(dense, images)
    for name, probe in probes.items():
        assert probe.rank == probe_rank(cost.shapes[name])
        cut = materialize(supernet, cost.dense_ranks | {name: probe.rank})
        assert not isinstance(cut.get_submodule(name), nn.Linear)
        found = log_probabilities(cut, images)
        divergence = nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True).item()
        assert probe.divergence == pytest.approx(divergence, rel=1e-3, abs=1e-6)
    assert max(probe.divergence for probe in probes.values()) > 0.01


@TWO_FAMILIES
def test_what_is_known_is_not_probed_again_and_every_round_is_told(family_supernet, images):
    dense, supernet, cost = family_supernet
    first, *others = cost.shapes
    known = {first: LayerSensitivity(rank=1, divergence=123.0)}
    told: list[int] = []
    probes = probe_layers(
        *(supernet, dense, cost, images), known=known, on_layers=lambda probes: told.append(len(probes))
    )
    assert probes[first] == known[first]
    assert told == list(range(2, len(cost.shapes) + 1))
    assert all(probes[name].divergence < 123 for name in others)


@pytest.mark.parametrize("family_supernet", ["vit"], indirect=True)
def test_a_model_of_many_layers_takes_no_more_passes(family_supernet, images, monkeypatch):
    monkeypatch.setattr(sensitivity, "MOST_PASSES", 4)
    dense, supernet, cost = family_supernet
    seen = 0.0
    attentions = [block.attn for model in (supernet, dense) for block in model.blocks]

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal seen
        seen += len(inputs[0]) / len(dense.blocks)

    hooks = [attention.register_forward_pre_hook(count) for attention in attentions]
    probe_layers(supernet, dense, cost, images, known={})
    for hook in hooks:
        hook.remove()
    assert 2 * len(images) < seen <= 4 * len(images)
