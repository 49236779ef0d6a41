"""Of each cost bin the best share stays, and with it the whole range of costs that could be reached before."""

import itertools
import random
from fractions import Fraction
from statistics import fmean

import pytest

from flora.errors import InputError
from flora.ranks.cost import ModelCost
from flora.ranks.filtering import BINS, block_macs, cost_bins, kept_candidates, kept_count, reachable_macs
from flora.ranks.space import SearchSpace, space_from_multiples
from tests.samples import cost_of

TOY = cost_of((8, 24, 5), (8, 32, 5), (32, 8, 5), (12, 36, 3), (12, 48, 3), (48, 12, 3))
TOY_SPACE = SearchSpace(
    choices={layer.name: (1, 4, "dense") for layer in TOY.layers},
    blocks=tuple(tuple(f"blocks.{block}.l{i}" for i in range(3)) for block in range(2)),
)


@pytest.fixture(scope="module")
def space(vit_cost: ModelCost) -> SearchSpace:
    return space_from_multiples(vit_cost, 8)


def random_errors(count: int, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [rng.random() for _ in range(count)]


def filtered(space: SearchSpace, kept: list) -> SearchSpace:
    return SearchSpace.model_validate(space.model_dump() | {"candidates": kept})


def test_the_macs_of_a_block_are_what_its_candidates_change(space: SearchSpace, vit_cost: ModelCost):
    names, macs = space.blocks[1], block_macs(space, vit_cost, 1)
    dense = sum(vit_cost.shapes[name].macs("dense") for name in names)
    assert len(macs) == space.block_size(1)
    for candidate, value in zip(space.block_candidates(1), macs, strict=True):
        ranks = vit_cost.dense_ranks | dict(zip(names, candidate, strict=True))
        assert vit_cost.macs(ranks) == vit_cost.dense_macs - dense + value


@pytest.mark.parametrize("bins", [1, 4, BINS])
def test_bins_hold_every_place_once_and_are_of_equal_width(space: SearchSpace, vit_cost: ModelCost, bins: int):
    macs = block_macs(space, vit_cost, 0)
    groups = cost_bins(macs, bins)
    assert sorted(itertools.chain(*groups)) == list(range(len(macs)))
    low, width = min(macs), Fraction(max(macs) - min(macs), bins)
    numbers = [{min((macs[place] - low) // width, bins - 1) for place in group} for group in groups]
    assert [number for one in numbers for number in one] == list(range(bins))


def test_a_bin_without_candidates_is_left_out():
    assert cost_bins([10, 100, 11, 12], 9) == [[0, 2, 3], [1]]


def test_candidates_of_one_cost_are_one_bin():
    assert cost_bins([7, 7, 7]) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("share", "candidates", "count"),
    [
        (0.3, 343, 103),
        (0.3, 216, 65),
        (0.3, 10, 3),
        (0.3, 11, 4),
        (0.01, 3, 1),
        (1, 5, 5),
        (0.07, 100, 7),
        (0.55, 20, 11),
    ],
)
def test_a_share_is_rounded_up_from_its_decimals(share: float, candidates: int, count: int):
    assert kept_count(share, candidates) == count


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share: float):
    with pytest.raises(InputError, match=rf"above 0 and at most at 1, got {share}"):
        kept_count(share, 10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_the_best_share_of_each_bin_stays_and_nothing_else_but_the_ends(space, vit_cost, seed: int, share: float):
    candidates, macs = space.block_candidates(0), block_macs(space, vit_cost, 0)
    errors = random_errors(len(candidates), seed)
    kept = kept_candidates(candidates, macs, errors, share)
    for group in cost_bins(macs):
        best = {candidates[place] for place in sorted(group, key=lambda p: errors[p])[: kept_count(share, len(group))]}
        staying = {candidates[place] for place in group} & set(kept)
        assert best <= staying <= best | {candidates[0], candidates[-1]}


@pytest.mark.parametrize("bins", [1, BINS])
def test_the_smallest_and_the_largest_stay_even_when_they_are_the_worst(space, vit_cost, bins: int):
    candidates = space.block_candidates(0)
    errors = [9.0, *random_errors(len(candidates) - 2, 0), 9.0]
    kept = kept_candidates(candidates, block_macs(space, vit_cost, 0), errors, 0.1, bins=bins)
    assert (kept[0], kept[-1]) == (candidates[0], candidates[-1])


def test_what_stays_keeps_its_order(space: SearchSpace, vit_cost: ModelCost):
    candidates = space.block_candidates(0)
    kept = kept_candidates(candidates, block_macs(space, vit_cost, 0), random_errors(len(candidates), 1), 0.3)
    assert kept == [candidate for candidate in candidates if candidate in set(kept)]


def test_of_equally_good_candidates_the_cheaper_stay():
    candidates = [(rank,) for rank in (1, 2, 3, 4, "dense")]
    assert kept_candidates(candidates, [10, 30, 20, 40, 50], [0.5] * 5, 0.4, bins=1) == [(1,), (3,), ("dense",)]


def test_cheap_budgets_stay_reachable_though_cheap_candidates_are_worse(space: SearchSpace, vit_cost: ModelCost):
    """Without bins the best 30 % are the dearest, and only the smallest of all is left of the cheaper half."""
    dearest = max(block_macs(space, vit_cost, 0))

    def kept(index: int, bins: int) -> list:
        macs = block_macs(space, vit_cost, index)
        return kept_candidates(space.block_candidates(index), macs, [1 - m / dearest for m in macs], 0.3, bins=bins)

    def widest_gap(space: SearchSpace) -> float:
        macs = sorted(block_macs(space, vit_cost, 0))
        return max(b - a for a, b in itertools.pairwise(macs)) / (macs[-1] - macs[0])

    binned, plain = (filtered(space, [kept(index, bins) for index in range(2)]) for bins in (BINS, 1))
    assert reachable_macs(binned, vit_cost)[:2] == reachable_macs(space, vit_cost)[:2]
    assert widest_gap(binned) < 2 / BINS
    assert widest_gap(plain) > 0.5


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_an_error_that_is_not_finite_is_refused_with_its_cause(error: float):
    with pytest.raises(InputError, match=f"error is {error}: the supernet gives no finite outputs"):
        kept_candidates([(1,), (2,), ("dense",)], [1, 2, 3], [0.1, error, 0.0], 0.3)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_the_reachable_macs_equal_those_of_all_configs(seed: int | None):
    space = TOY_SPACE
    if seed is not None:
        macs = [block_macs(space, TOY, index) for index in range(2)]
        errors = random_errors(27, seed)
        space = filtered(space, [kept_candidates(space.block_candidates(i), macs[i], errors, 0.3) for i in range(2)])
    every = [
        TOY.macs(dict(zip(itertools.chain(*space.blocks), itertools.chain(*parts), strict=True)))
        for parts in itertools.product(*(space.block_candidates(i) for i in range(2)))
    ]
    assert len(every) == space.size
    assert reachable_macs(space, TOY) == (min(every), max(every), pytest.approx(fmean(every)))
