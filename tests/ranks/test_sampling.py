"""Draws follow their formula: low-rank-aware or uniform, free or inside the window of a budget."""

import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from flora.errors import InputError
from flora.ranks.budget import Budget
from flora.ranks.cost import ModelCost, Rank
from flora.ranks.paper import paper_flops
from flora.ranks.sampling import BudgetSampler, Sampler, sandwich
from flora.ranks.space import GRIDS, SearchSpace, space_from_multiples, space_from_ratios
from tests.ranks.jagged import jagged_budget
from tests.samples import cost_of

DEIT_B = cost_of(*[(768, 2304, 197), (768, 3072, 197), (3072, 768, 197)] * 12)
TOY = cost_of((8, 24, 5), (8, 32, 5), (32, 8, 5), (8, 24, 5))
ODD = cost_of((47, 141, 53), (31, 190, 51), (191, 48, 49), (29, 91, 13))  # millions of different costs
WEIGHTINGS = ("uniform", "low-rank-aware")


def _space(cost: ModelCost) -> SearchSpace:
    return space_from_ratios(cost, [0.125, 0.25, 0.5, 1])


def _filtered(space: SearchSpace, kept: int, seed: int = 0) -> SearchSpace:
    """A random choice of `kept` candidates for each block, the smallest and the largest among them."""
    rng = random.Random(seed)
    candidates = []
    for i in range(len(space.blocks)):
        every = space.block_candidates(i)
        inner = rng.sample(every[1:-1], min(kept, len(every)) - 2)
        candidates.append((every[0], *inner, every[-1]))
    return space.model_copy(update={"candidates": tuple(candidates)})


def _configs(space: SearchSpace) -> list[dict[str, Rank]]:
    """Every config of a small space, in the order of its layers."""
    decisions = space.decisions()
    found = []
    for picks in itertools.product(*(candidates for _, candidates in decisions)):
        ranks = {
            name: rank
            for (layers, _), pick in zip(decisions, picks, strict=True)
            for name, rank in zip(layers, pick, strict=True)
        }
        found.append({name: ranks[name] for name in space.choices})
    return found


def _weight(ranks: dict[str, Rank], cost: ModelCost, weighting: str) -> float:
    if weighting == "uniform":
        return 1.0
    return math.prod(1 if rank == "dense" else cost.shapes[name].full_rank / rank for name, rank in ranks.items())


def _check_frequencies(draw: Callable[[], dict[str, Rank]], weights: dict[tuple, float], draws: int) -> None:
    """Chi-square: the statistic has mean df and variance 2 df under the law; five sigmas are allowed."""
    counts = Counter(tuple(draw().values()) for _ in range(draws))
    assert set(counts) <= set(weights)
    total = sum(weights.values())
    statistic = sum((counts[key] - (e := draws * w / total)) ** 2 / e for key, w in weights.items())
    freedom = len(weights) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("filtered", [False, True])
def test_draws_follow_the_formula_block_by_block(weighting, filtered: bool):
    space = _filtered(_space(TOY), 9) if filtered else _space(TOY)
    sampler, rng = Sampler(space, TOY, weighting), random.Random(1)
    drawn = [sampler.sample(rng) for _ in range(6000)]
    assert all(ranks in space and list(ranks) == list(space.choices) for ranks in drawn)
    for i, block in enumerate(space.blocks):
        weights = {c: _weight(dict(zip(block, c, strict=True)), TOY, weighting) for c in space.block_candidates(i)}
        turn = iter(drawn)
        _check_frequencies(lambda: {name: r for name, r in next(turn).items() if name in block}, weights, len(drawn))  # noqa: B023


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("filtered", [False, True])
def test_expected_macs_are_the_weighted_mean_and_that_of_many_draws(weighting, filtered: bool):
    space = _filtered(_space(TOY), 9) if filtered else _space(TOY)
    sampler, rng = Sampler(space, TOY, weighting), random.Random(2)
    configs = _configs(space)
    weights = [_weight(ranks, TOY, weighting) for ranks in configs]
    mean = sum(w * TOY.macs(ranks) for w, ranks in zip(weights, configs, strict=True)) / sum(weights)
    assert sampler.expected_macs() == pytest.approx(mean, rel=1e-12)
    drawn = [TOY.macs(sampler.sample(rng)) for _ in range(4000)]
    assert sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize(("weighting", "gflops"), [("low-rank-aware", 8.66), ("uniform", 11.74)])
def test_the_papers_mean_flops_of_deit_b(weighting, gflops: float):
    flops = replace(DEIT_B, fixed_macs=paper_flops(768, [(768,) * 3] * 12) - 12 * 197 * 11 * 768**2)
    space = space_from_ratios(flops, GRIDS["eighths"], keep_redundant=True)
    assert space.size == 343**12
    assert round(Sampler(space, flops, weighting).expected_macs() / 1e9, 2) == gflops
    assert round(flops.macs(space.smallest()) / 1e9, 2) == 4.67
    assert flops.macs(space.largest()) == 17_567_460_096


def test_low_ranks_of_the_papers_space_are_512_times_likelier():
    space = space_from_ratios(DEIT_B, GRIDS["eighths"], keep_redundant=True)
    block = dict.fromkeys(space.blocks[0], 96)
    assert _weight(block, DEIT_B, "low-rank-aware") == 512


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_same_seed_gives_the_same_draws(weighting):
    space, budget = _space(TOY), Budget.parse("macs=60%", TOY)
    for sampler in (Sampler(space, TOY, weighting), BudgetSampler(space, TOY, budget, weighting=weighting)):
        first, second = ([sampler.sample(rng) for _ in range(20)] for rng in (random.Random(5), random.Random(5)))
        assert first == second


def test_an_unknown_weighting_is_refused_with_the_near_one():
    with pytest.raises(InputError, match="Did you mean low-rank-aware"):
        Sampler(_space(TOY), TOY, "low-rank")  # type: ignore[arg-type]


def test_a_sandwich_is_the_largest_the_smallest_and_what_lies_between():
    space = _space(TOY)
    sampler = Sampler(space, TOY)
    configs = sandwich(space, sampler, random.Random(3), 2)
    rng = random.Random(3)
    assert configs == [space.largest(), space.smallest(), sampler.sample(rng), sampler.sample(rng)]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("text", ["macs=50%", "params=60%"])
def test_draws_in_a_window_have_the_conditional_distribution(weighting, filtered: bool, text: str):
    space, budget = (_filtered(_space(TOY), 12) if filtered else _space(TOY)), Budget.parse(text, TOY)
    sampler = BudgetSampler(space, TOY, budget, window=0.2, weighting=weighting)
    weights = {
        tuple(ranks.values()): _weight(ranks, TOY, weighting)
        for ranks in _configs(space)
        if 0.8 * budget.limit <= budget.cost_of(TOY, ranks) <= budget.limit
    }
    assert len(weights) > 5
    rng = random.Random(4)
    _check_frequencies(lambda: sampler.sample(rng), weights, 3000)


@pytest.mark.parametrize("seed", range(6))
def test_draws_by_latency_lie_in_the_window_though_the_lowest_ranks_are_not_the_fastest(seed: int):
    space = _filtered(_space(TOY), 12, seed) if seed % 2 else _space(TOY)
    budget = jagged_budget(TOY, 0.75, seed)
    costs = sorted(budget.cost_of(TOY, ranks) for ranks in _configs(space))
    assert budget.cost_of(TOY, budget.cheapest(space, TOY)) == costs[0]
    sampler = BudgetSampler(space, TOY, budget, window=0.1)
    rounding = len(space.decisions()) * (costs[-1] - costs[0]) // 60_000
    below = max(c for c in costs if c <= budget.limit - rounding)
    rng = random.Random(seed)
    for _ in range(50):
        drawn = sampler.sample(rng)
        assert drawn in space
        assert min(below, 0.9 * budget.limit) - rounding <= budget.cost_of(TOY, drawn) <= budget.limit
    with pytest.raises(InputError, match="below the smallest subnet"):
        BudgetSampler(space, TOY, replace(budget, limit=costs[0] - 1))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("cost", [TOY, ODD], ids=["exact", "binned"])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_draw_lies_in_the_window_or_nearest_below_it(cost: ModelCost, kind: str, seed: int):
    rng = random.Random(seed)
    space = _filtered(_space(cost), 12, seed) if seed % 2 else _space(cost)
    whole = Budget.parse(f"{kind}=100%", cost)
    costs = sorted(whole.cost_of(cost, ranks) for ranks in _configs(space))
    limit = rng.choice([costs[0], costs[-1], rng.choice(costs), rng.randint(costs[0], costs[-1])])
    window = rng.choice([0, 0.02, 0.1])
    sampler = BudgetSampler(space, cost, replace(whole, limit=limit), window=window)
    rounding = 0 if cost is TOY else len(space.decisions()) * (costs[-1] - costs[0]) // 60_000
    below = max(c for c in costs if c <= max(costs[0], limit - rounding))
    lowest = min(below, (1 - window) * limit) - rounding
    for _ in range(30):
        drawn = sampler.sample(rng)
        spent = whole.cost_of(cost, drawn)
        assert drawn in space
        assert lowest <= spent <= limit


def test_a_binned_draw_has_nearly_the_conditional_distribution():
    space, budget = _space(ODD), Budget.parse("macs=50%", ODD)
    sampler = BudgetSampler(space, ODD, budget, window=0.2)
    weights = {
        tuple(ranks.values()): 1.0 for ranks in _configs(space) if 0.8 * budget.limit <= ODD.macs(ranks) <= budget.limit
    }
    assert len(weights) > 20
    rng = random.Random(6)
    _check_frequencies(lambda: sampler.sample(rng), weights, 3000)


def test_a_budget_above_the_largest_subnet_opens_its_window_below_that():
    space = _space(TOY)
    sampler = BudgetSampler(space, TOY, Budget.parse("macs=1G", TOY))
    rng = random.Random(0)
    assert sampler.limit == TOY.dense_macs
    assert all(TOY.macs(sampler.sample(rng)) >= 0.95 * TOY.dense_macs for _ in range(50))


def test_a_budget_below_the_smallest_subnet_is_refused():
    with pytest.raises(InputError, match="below the smallest subnet"):
        BudgetSampler(_space(TOY), TOY, Budget.parse("macs=1%", TOY))


@pytest.mark.parametrize("window", [-0.1, 1, float("nan")])
def test_a_window_out_of_range_is_refused(window: float):
    with pytest.raises(InputError, match=str(window)):
        BudgetSampler(_space(TOY), TOY, Budget.parse("macs=50%", TOY), window=window)


def test_the_rare_ends_of_a_long_sum_do_not_vanish():
    cost = cost_of(*[(768, 768, 197)] * 160)
    space = space_from_multiples(cost, 8)
    smallest = cost.macs(space.smallest())
    sampler = BudgetSampler(space, cost, Budget(kind="macs", limit=smallest, text="macs"), weighting="low-rank-aware")
    assert sampler.sample(random.Random(0)) == space.smallest()


@pytest.mark.parametrize(
    "space",
    [_filtered(space_from_ratios(DEIT_B, GRIDS["eighths"]), 100), space_from_multiples(DEIT_B, 8)],
    ids=["filtered", "multiples"],
)
def test_a_draw_from_a_space_of_deit_b_takes_milliseconds(space: SearchSpace):
    start = time.process_time()
    sampler = BudgetSampler(space, DEIT_B, Budget.parse("macs=45%", DEIT_B))
    assert time.process_time() - start < 2
    rng, start = random.Random(0), time.process_time()
    drawn = [sampler.sample(rng) for _ in range(50)]
    assert (time.process_time() - start) / 50 < 5e-3
    assert all(sampler.lowest <= DEIT_B.macs(ranks) <= sampler.limit for ranks in drawn)
    assert len({tuple(ranks.values()) for ranks in drawn}) == 50
