"""A candidate's error is that of the whole supernet with all other blocks at full rank, found with less work."""

from pathlib import Path
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora.errors import InputError
from flora.lowrank.supernet import active_ranks, build_supernet, elastic_layers, set_ranks
from flora.lowrank.targets import find_targets, trace_cost
from flora.ranks.cost import ModelCost
from flora.ranks.filtering import block_macs, cost_bins, kept_candidates, kept_count
from flora.ranks.space import SearchSpace, blocks_of, space_from_ratios
from flora.training.data import TimmImages
from flora.training.filtering import BlockScores, score_block
from flora.training.selection import SelectionImages, log_probabilities
from tests.samples import GREY, IMAGE, random_images, random_ranks, tiny_model

# Share, bins and runs with which every candidate is run.
ALL_RUN = {"share": 1.0, "bins": 1, "runs_per_bin": 1000}
TWO_FAMILIES = pytest.mark.parametrize("family_supernet", ["vit", "swin"], indirect=True)


@pytest.fixture
def images(image_folder: Path) -> SelectionImages:
    """Eight images in three batches."""
    return SelectionImages(TimmImages(f"{image_folder},limit=8", GREY), batch_size=3)


def small_space(cost: ModelCost) -> SearchSpace:
    return space_from_ratios(cost, [0.1, 0.4, 1])


@torch.no_grad()
def plain_errors(supernet: nn.Module, dense: nn.Module, space: SearchSpace, index: int, images) -> list[Tensor]:
    """The mean divergence of each candidate of a block by plain forwards of the supernet."""
    batch = torch.cat([images for images, _ in images.batches()])
    target, errors = dense(batch).softmax(1), []
    for candidate in space.block_candidates(index):
        with active_ranks(supernet, space.largest() | dict(zip(space.blocks[index], candidate, strict=True))):
            errors.append(F.kl_div(supernet(batch).log_softmax(1), target, reduction="batchmean"))
    return errors


def scored(family: tuple, index: int, images: SelectionImages, **options) -> BlockScores:
    dense, supernet, cost = family
    return score_block(
        supernet, small_space(cost), cost, index, images, log_probabilities(dense, images), **(ALL_RUN | options)
    )


def indices(family: tuple) -> range:
    return range(len(small_space(family[2]).blocks))


@TWO_FAMILIES
def test_an_error_equals_a_plain_forward_of_the_whole_supernet(family_supernet, images: SelectionImages):
    dense, supernet, cost = family_supernet
    for index in indices(family_supernet):
        scores = scored(family_supernet, index, images)
        expected = plain_errors(supernet, dense, small_space(cost), index, images)
        assert max(expected) > 0.01
        torch.testing.assert_close(torch.tensor(scores.errors), torch.stack(expected), atol=1e-6, rtol=1e-4)


@TWO_FAMILIES
def test_the_full_rank_candidate_has_no_error_and_agrees_on_every_image(family_supernet, images: SelectionImages):
    for index in indices(family_supernet):
        scores = scored(family_supernet, index, images)
        assert set(scores.candidates[-1]) == {"dense"}
        assert scores.errors[-1] < 1e-6
        assert scores.agreements[-1] == 100


@TWO_FAMILIES
@pytest.mark.parametrize("options", [{}, {"share": 0.2, "bins": 3, "runs_per_bin": 2}], ids=["all run", "few run"])
def test_image_forwards_are_the_work_that_the_layers_did(family_supernet, images: SelectionImages, options: dict):
    _, supernet, cost = family_supernet
    done: list[int] = []

    def add(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        done.append(inputs[0].numel() * layer.out_features)

    hooks = [layer.register_forward_hook(add) for layer in elastic_layers(supernet).values()]
    try:
        for index in indices(family_supernet):
            done.clear()
            scores = scored(family_supernet, index, images, **options)
            assert scores.image_forwards == pytest.approx(sum(done) / sum(layer.macs("dense") for layer in cost.layers))
    finally:
        for hook in hooks:
            hook.remove()


def test_a_candidate_of_the_last_of_two_blocks_costs_half_a_model(supernet, vit_cost, images: SelectionImages):
    family = tiny_model(), supernet, vit_cost
    first, last = (scored(family, index, images).image_forwards for index in range(2))
    assert first == pytest.approx(8 * (27 + 1))
    assert last == pytest.approx(8 * (27 / 2 + 1))


@TWO_FAMILIES
def test_a_share_of_each_bin_stays_and_the_two_ends(family_supernet, images: SelectionImages):
    space = small_space(family_supernet[2])
    for index in indices(family_supernet):
        scores = scored(family_supernet, index, images, share=0.3, bins=3, runs_per_bin=4)
        assert scores.candidates == space.block_candidates(index)
        assert list(scores.macs) == block_macs(space, family_supernet[2], index)
        assert list(scores.kept) == kept_candidates(scores.candidates, scores.macs, scores.errors, 0.3, bins=3)
        most = sum(kept_count(0.3, len(group)) for group in cost_bins(scores.macs, 3)) + 2
        assert len(scores.kept) <= most < len(scores.candidates)
        assert {scores.candidates[0], scores.candidates[-1]} <= set(scores.kept)


def test_what_was_not_run_is_predicted_by_its_layers_alone_on_the_scale_of_its_bin(supernet, vit_cost, images):
    dense, space, full = tiny_model(), small_space(vit_cost), small_space(vit_cost).largest()
    scores = scored((dense, supernet, vit_cost), 0, images, share=0.2, bins=3, runs_per_bin=2)
    exact = dict(zip(scores.candidates, plain_errors(supernet, dense, space, 0, images), strict=True))
    names = space.blocks[0]

    def predicted(candidate: tuple) -> float:
        alone = [tuple(r if name == n else full[n] for n in names) for name, r in zip(names, candidate, strict=True)]
        return sum(float(exact[one]) for one in alone)

    not_run = [place for place, agreement in enumerate(scores.agreements) if agreement is None]
    assert 5 < len(not_run) < 20
    for group in cost_bins(scores.macs, 3):
        factors = {p: scores.errors[p] / (predicted(scores.candidates[p]) or 1.0) for p in group}
        run = [p for p in group if p not in not_run]
        scale = median(factors[p] for p in run if scores.candidates[p] != scores.candidates[-1])
        assert [factors[p] for p in group if p in not_run] == [pytest.approx(scale, rel=1e-3)] * (len(group) - len(run))
        for place in run:
            assert scores.errors[place] == pytest.approx(float(exact[scores.candidates[place]]), rel=1e-4, abs=1e-6)


def test_a_block_that_changes_the_shape_is_not_passed_through(images: SelectionImages):
    """Swin's merging of patches as a target: the block is its whole stage, behind which others begin."""
    dense, supernet = tiny_model("swin"), tiny_model("swin")
    cost = trace_cost(supernet, find_targets(supernet, ["qkv", "fc1", "fc2", "reduction"]), IMAGE)
    build_supernet(supernet, cost, batches=[random_images(4)])
    assert ("layers.1.downsample.reduction",) in blocks_of(cost.shapes)
    for index in indices((dense, supernet, cost)):
        scores = scored((dense, supernet, cost), index, images)
        expected = torch.stack(plain_errors(supernet, dense, small_space(cost), index, images))
        torch.testing.assert_close(torch.tensor(scores.errors), expected, atol=1e-6, rtol=1e-4)


def test_inputs_that_are_too_many_to_keep_are_computed_again(supernet, vit_cost, images, monkeypatch):
    """The limit is held by what the first of the three batches says of all eight images."""
    family, tokens = (tiny_model(), supernet, vit_cost), vit_cost.shapes["blocks.0.attn.qkv"].tokens
    kept = scored(family, 1, images)
    for limit, forwards in ((8 * tokens * 48 * 4, kept.image_forwards), (8 * tokens * 48 * 4 - 1, 8 * (27 + 1))):
        monkeypatch.setattr("flora.lowrank.replay.REPLAY_BYTES", limit)
        again = scored(family, 1, images)
        assert again.image_forwards == pytest.approx(forwards)
        assert again.errors == pytest.approx(kept.errors, rel=1e-4, abs=1e-6)
        assert again.kept == kept.kept


def test_scoring_leaves_the_supernet_as_it_was(supernet: nn.Module, vit_cost: ModelCost, images: SelectionImages):
    set_ranks(supernet, random_ranks(vit_cost, 1))
    with torch.no_grad():
        before = supernet(random_images(2))
    scored((tiny_model(), supernet, vit_cost), 1, images)
    with torch.no_grad():
        assert torch.equal(supernet(random_images(2)), before)


def test_a_supernet_that_gives_no_finite_outputs_is_refused(supernet, vit_cost, images: SelectionImages):
    with torch.no_grad():
        supernet.blocks[1].mlp.fc1.up[0, 0] = float("nan")
    with pytest.raises(InputError, match="no finite outputs"):
        scored((tiny_model(), supernet, vit_cost), 0, images)
    assert not any("forward" in vars(block) for block in supernet.blocks)


def test_scores_survive_json(supernet: nn.Module, vit_cost: ModelCost, images: SelectionImages):
    scores = scored((tiny_model(), supernet, vit_cost), 0, images, share=0.2, bins=3, runs_per_bin=2)
    assert BlockScores.model_validate_json(scores.model_dump_json()) == scores
