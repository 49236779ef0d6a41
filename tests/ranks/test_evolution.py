"""The search: the same from the same seed, interrupted or not; equal to brute force; never outside space and budget."""

import itertools
import pickle
import random
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from flora.errors import InputError
from flora.ranks.budget import Budget
from flora.ranks.cost import ModelCost, Rank
from flora.ranks.evolution import SearchSettings, SearchState, best, crossover, evolve, mutate, pareto
from flora.ranks.space import SearchSpace, space_from_multiples, space_from_ratios
from tests.ranks.jagged import jagged_budget
from tests.samples import cost_of

COST = cost_of(*[(16, 48, 5), (16, 64, 5), (64, 16, 5)] * 3)
SPACE = space_from_ratios(COST, [n / 8 for n in (1, 2, 3, 4, 5, 8)])
DEEP = cost_of(*[(16, 48, 5), (16, 64, 5), (64, 16, 5)] * 8)
DEEP_SPACE = space_from_ratios(DEEP, [n / 8 for n in (1, 2, 3, 4, 5, 8)])
TOY = cost_of((16, 48, 5), (16, 64, 5), (64, 16, 5), (16, 48, 5), (16, 64, 5))
TOY_SPACE = space_from_ratios(TOY, [0.25, 0.5, 1])
BUDGET = Budget.parse("macs=60%", COST)
IMAGES = 256
SMALL = SearchSettings(population=12, parents=4, mutants=5, crossovers=5, generations=4)


class Scorer:
    """The score of a config: what its ranks keep, each layer of other worth, on images of other difficulty."""

    def __init__(self, cost: ModelCost = COST, *, seed: int = 0, stop_after: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.cost = cost
        self.worth = dict(zip(cost.shapes, rng.uniform(0.2, 1, len(cost.layers)), strict=True))
        self.difficulty = rng.normal(size=IMAGES)
        self.stop_after = stop_after
        self.forwards = 0

    def quality(self, ranks) -> float:
        shares = {n: 1 if r == "dense" else r / self.cost.shapes[n].full_rank for n, r in ranks.items()}
        return sum(self.worth[name] * share**0.5 for name, share in shares.items())

    def __call__(self, configs, start: int, stop: int) -> list[np.ndarray]:
        if self.stop_after is not None:
            self.stop_after -= 1
            if self.stop_after < 0:
                raise KeyboardInterrupt
        self.forwards += len(configs) * (stop - start)
        return [self.quality(ranks) + self._own(ranks, start, stop) for ranks in configs]

    def _own(self, ranks, start: int, stop: int) -> np.ndarray:
        noise = np.random.default_rng([1 if r == "dense" else 2 + r for r in ranks.values()]).normal(size=IMAGES)
        return (self.difficulty + 0.1 * noise)[start:stop]


def _filtered(space: SearchSpace, kept: int) -> SearchSpace:
    rng = random.Random(0)
    every = [space.block_candidates(i) for i in range(len(space.blocks))]
    candidates = tuple((block[0], *rng.sample(block[1:-1], kept - 2), block[-1]) for block in every)
    return space.model_copy(update={"candidates": candidates})


def _search(
    space: SearchSpace = SPACE, scorer: Scorer | None = None, budget: Budget = BUDGET, **options
) -> SearchState:
    scorer = scorer or Scorer()
    return evolve(space, scorer.cost, budget, scorer, **{"images": IMAGES, "settings": SMALL, **options})


def _content(state: SearchState, folder: Path) -> bytes:
    state.save(folder / "content")
    return (folder / "content").read_bytes()


def _all_configs(space: SearchSpace) -> list[dict[str, Rank]]:
    return [dict(zip(space.choices, ranks, strict=True)) for ranks in itertools.product(*space.choices.values())]


@pytest.mark.parametrize("space", [SPACE, _filtered(SPACE, 20)], ids=["unfiltered", "filtered"])
def test_children_never_leave_the_space(space: SearchSpace):
    rng = random.Random(0)
    a, b = space.smallest(), space.largest()
    for _ in range(300):
        a, b = mutate(crossover(a, b, space, rng), space, rng, 0.5), mutate(a, space, rng, 1)
        assert a in space
        assert b in space


def test_a_mutant_differs_in_whole_blocks_with_the_given_probability():
    rng, parent = random.Random(0), SPACE.smallest()
    changed = [
        any(child[name] != parent[name] for name in block)
        for child in (mutate(parent, SPACE, rng, 0.2) for _ in range(2000))
        for block in SPACE.blocks
    ]
    assert sum(changed) / len(changed) == pytest.approx(0.2 * (1 - 1 / SPACE.block_size(0)), abs=0.02)


def test_a_mutation_does_not_list_the_candidates_of_a_block():
    cost = cost_of(*[(768, 2304, 197), (768, 3072, 197), (3072, 768, 197)] * 12)
    space = space_from_multiples(cost, 1)
    assert mutate(space.smallest(), space, random.Random(0), 1) in space


def test_a_child_of_two_has_each_block_from_one_of_them():
    rng, a, b = random.Random(0), SPACE.smallest(), SPACE.largest()
    children = [crossover(a, b, SPACE, rng) for _ in range(400)]
    blocks = [tuple(child[name] for name in block) for child in children for block in SPACE.blocks]
    kinds = {tuple(parent[name] for name in SPACE.blocks[0]) for parent in (a, b)}
    assert set(blocks) == kinds
    assert blocks.count(min(kinds, key=str)) / len(blocks) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("space", [SPACE, _filtered(SPACE, 40)], ids=["unfiltered", "filtered"])
@pytest.mark.parametrize("text", ["macs=45%", "params=70%", "macs=85%"])
def test_everything_evaluated_is_unique_in_the_space_and_in_the_window(space: SearchSpace, text: str):
    budget = Budget.parse(text, COST)
    state = _search(space, budget=budget)
    assert len(state.evaluated) == len({tuple(e.ranks.values()) for e in state.evaluated}) > 12
    for e in state.evaluated:
        assert e.ranks in space
        assert (e.macs, e.params) == (COST.macs(e.ranks), COST.params(e.ranks))
        assert 0.95 * budget.limit <= getattr(e, budget.kind) <= budget.limit


def test_a_budget_below_the_smallest_subnet_is_refused_before_anything_is_evaluated():
    scorer = Scorer()
    with pytest.raises(InputError, match="below the smallest subnet"):
        _search(scorer=scorer, budget=Budget.parse("macs=1%", COST))
    assert scorer.forwards == 0


def test_the_same_seed_gives_the_same_search_and_another_one_another(tmp_path: Path):
    first, again, other = (_content(_search(settings=replace(SMALL, seed=s)), tmp_path) for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("halving", [True, False])
@pytest.mark.parametrize("calls", range(0, 10, 3))
def test_interrupted_in_an_evaluation_and_resumed_equals_uninterrupted(tmp_path: Path, calls: int, halving: bool):
    settings, path = replace(SMALL, halving=halving), tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        _search(
            scorer=Scorer(stop_after=calls if halving else calls // 3),
            settings=settings,
            on_generation=lambda state: state.save(path),
        )
    state = SearchState.load(path) if path.exists() else None
    assert _content(_search(settings=settings, state=state), tmp_path) == _content(_search(settings=settings), tmp_path)


@pytest.mark.parametrize("generation", range(5))
def test_interrupted_after_a_generation_and_resumed_equals_uninterrupted(tmp_path: Path, generation: int):
    def save_and_stop(state: SearchState) -> None:
        state.save(tmp_path / "state")
        if state.generation == generation:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _search(on_generation=save_and_stop)
    resumed = _search(state=SearchState.load(tmp_path / "state"))
    assert _content(resumed, tmp_path) == _content(_search(), tmp_path)


def test_a_finished_search_evaluates_nothing_more():
    state, scorer = _search(), Scorer()
    assert _search(scorer=scorer, state=state) is state
    assert scorer.forwards == 0


@pytest.mark.parametrize("halving", [True, False])
@pytest.mark.parametrize("text", ["macs=50%", "macs=75%", "params=60%"])
def test_the_best_is_that_of_brute_force(text: str, halving: bool):
    scorer, budget = Scorer(TOY), Budget.parse(text, TOY)
    fitting = [
        ranks for ranks in _all_configs(TOY_SPACE) if 0.8 * budget.limit <= budget.cost_of(TOY, ranks) <= budget.limit
    ]
    found = best(_search(TOY_SPACE, scorer, budget, settings=SearchSettings(window=0.2, halving=halving)))
    assert found.ranks == max(fitting, key=lambda ranks: scorer([ranks], 0, IMAGES)[0].mean())


@pytest.mark.parametrize("seed", range(4))
def test_within_a_latency_that_does_not_rise_with_the_rank_the_best_is_that_of_brute_force(seed: int):
    scorer, budget = Scorer(TOY, seed=seed), jagged_budget(TOY, 0.7, seed)
    costs = {tuple(ranks.values()): budget.cost_of(TOY, ranks) for ranks in _all_configs(TOY_SPACE)}
    assert min(costs, key=costs.__getitem__) != tuple(TOY_SPACE.smallest().values())
    fitting = [
        ranks for ranks in _all_configs(TOY_SPACE) if 0.7 * budget.limit <= costs[tuple(ranks.values())] <= budget.limit
    ]
    state = _search(TOY_SPACE, scorer, budget, settings=SearchSettings(window=0.3, seed=seed))
    assert all(costs[tuple(one.ranks.values())] <= budget.limit for one in state.evaluated)
    assert best(state).ranks == max(fitting, key=lambda ranks: scorer([ranks], 0, IMAGES)[0].mean())


def test_a_search_by_latency_goes_on_to_the_bit_and_only_by_the_same_table(tmp_path: Path):
    budget = jagged_budget(COST, 0.6)
    whole = _search(budget=budget)
    kept: list[SearchState] = []
    _search(budget=budget, settings=replace(SMALL, generations=2), on_generation=kept.append)
    kept[-1].save(tmp_path / "state")
    stopped = replace(SearchState.load(tmp_path / "state"), settings=SMALL)
    assert _content(_search(budget=budget, state=stopped), tmp_path) == _content(whole, tmp_path)
    other = replace(jagged_budget(COST, 0.6, seed=1), limit=budget.limit)
    with pytest.raises(InputError, match="the latency table differs"):
        _search(budget=other, state=whole)


@pytest.mark.parametrize("seed", range(3))
def test_it_beats_as_many_random_draws(seed: int):
    settings, budget = replace(SMALL, generations=8, seed=seed), Budget.parse("macs=60%", DEEP)
    draws = replace(settings, population=12 * 9, generations=0)
    found, drawn = (best(_search(DEEP_SPACE, Scorer(DEEP), budget, settings=s)).score for s in (settings, draws))
    assert found > drawn


def test_without_halving_the_papers_settings_evaluate_50_configs_in_21_generations():
    scorer = Scorer(DEEP)
    settings = SearchSettings(halving=False)
    state = _search(DEEP_SPACE, scorer, Budget.parse("macs=60%", DEEP), settings=settings, images=2)
    assert [sum(e.generation == g for e in state.evaluated) for g in range(21)] == [50] * 21
    assert state.image_forwards == scorer.forwards == 1050 * 2
    origins = [e.origin for e in state.evaluated if e.generation]
    assert origins.count("mutation") == 25 * 20
    assert 100 < origins.count("crossover") <= 25 * 20


def test_halving_spends_fewer_images_for_a_best_that_is_as_good():
    raced, plain = (_search(settings=replace(SMALL, generations=8, halving=halving)) for halving in (True, False))
    assert raced.image_forwards == sum(e.images for e in raced.evaluated) < 0.75 * plain.image_forwards
    assert best(raced).score > 0.99 * best(plain).score


@pytest.mark.parametrize("halving", [True, False])
def test_parents_are_the_best_of_all_that_were_fully_evaluated(halving: bool):
    state, scorer = _search(settings=replace(SMALL, halving=halving)), Scorer()
    complete = sorted((e for e in state.evaluated if e.images == IMAGES), key=lambda e: -e.score)
    assert [state.evaluated[i] for i in state.parents] == complete[:4]
    for i, scores in zip(state.parents, state.parent_scores, strict=True):
        assert np.array_equal(scores, scorer([state.evaluated[i].ranks], 0, IMAGES)[0].astype(np.float32))


def test_a_search_that_finds_nothing_more_ends_and_says_so():
    states: list[SearchState] = []
    budget = Budget.parse("macs=50%", TOY)
    state = _search(TOY_SPACE, Scorer(TOY), budget, settings=SearchSettings(), on_generation=states.append)
    assert state.exhausted
    assert state.generation < SearchSettings().generations
    assert states[-1] is state
    assert not _search().exhausted


def test_a_space_of_one_config_is_searched_in_one_generation():
    cost = cost_of((8, 8, 1))
    state = _search(space_from_multiples(cost, 8), Scorer(cost), Budget.parse("macs=100%", cost))
    assert [e.ranks for e in state.evaluated] == [cost.dense_ranks]
    assert state.exhausted


def test_initial_configs_that_fit_come_first_and_others_are_left_out():
    far_below, outside = SPACE.smallest(), dict.fromkeys(SPACE.choices, 1)
    initial = [far_below, outside, SPACE.largest(), far_below, {"other": 1}]
    state = _search(initial=initial)
    assert [e.ranks for e in state.evaluated if e.origin == "initial"] == [far_below]
    assert state.evaluated[0].ranks == far_below
    assert sum(e.generation == 0 for e in state.evaluated) == 12


def test_initial_configs_beyond_the_population_are_left_out():
    settings = replace(SMALL, population=1, parents=1, mutants=0, crossovers=0, generations=0)
    state = _search(initial=[SPACE.smallest(), {**SPACE.smallest(), "blocks.0.l0": 4}], settings=settings)
    assert [e.origin for e in state.evaluated] == ["initial"]


def test_a_state_survives_its_file(tmp_path: Path):
    state = _search()
    state.save(tmp_path / "state")
    loaded = SearchState.load(tmp_path / "state")
    assert loaded.evaluated == state.evaluated
    assert [list(e.ranks) for e in loaded.evaluated] == [list(e.ranks) for e in state.evaluated]
    assert np.array_equal(loaded.parent_scores, state.parent_scores)
    for name in ("settings", "budget", "images", "digest", "generation", "parents", "image_forwards", "exhausted"):
        assert getattr(loaded, name) == getattr(state, name)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_truncated_or_damaged_file_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "state"
    whole = _content(_search(), tmp_path)
    rng = random.Random(0)
    for length in (0, 1, 4, 100, *(rng.randrange(len(whole)) for _ in range(60)), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="state"):
            SearchState.load(path)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert _content(SearchState.load(path), tmp_path) == whole  # a bit that nothing reads
        except InputError as error:
            assert "state" in str(error)  # noqa: PT017


def test_a_foreign_file_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "foreign"
    with pytest.raises(InputError, match="does not exist"):
        SearchState.load(path)
    with pytest.raises(InputError, match="foreign"):
        SearchState.load(tmp_path / "foreign" / "file")
    for content in (b"{}", pickle.dumps({"state": 1}), b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="foreign"):
            SearchState.load(path)
    for save, arrays in (
        (np.save, {"arr": np.ones(3)}),
        (np.savez, {"state": np.array([{}], dtype=object), "parent_scores": np.ones(3)}),
        (np.savez, {"weights": np.ones(3)}),
        (np.savez, {"state": np.frombuffer(b"{}", np.uint8), "parent_scores": np.ones(3)}),
        (np.savez, {"state": np.array([255], np.uint8), "parent_scores": np.ones(3)}),
    ):
        with path.open("wb") as file:
            save(file, **arrays)
        with pytest.raises(InputError, match="foreign"):
            SearchState.load(path)


def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path):
    state = _search()
    for wrong in (
        replace(state, parent_scores=state.parent_scores[1:]),
        replace(state, parent_scores=state.parent_scores.astype(float)),
        replace(state, parents=(*state.parents[1:], len(state.evaluated))),
        replace(state, evaluated=(*state.evaluated[:-1], replace(state.evaluated[-1], ranks={}))),
    ):
        wrong.save(tmp_path / "state")
        with pytest.raises(InputError, match="do not fit together"):
            SearchState.load(tmp_path / "state")


def test_a_state_of_another_search_is_refused_with_what_differs():
    state = _search()
    with pytest.raises(InputError, match=r"population is 12, now 13; seed is 0, now 5\."):
        _search(state=state, settings=replace(SMALL, population=13, seed=5))
    with pytest.raises(InputError, match=r"budget is macs=60% .* now macs=70%"):
        _search(state=state, budget=Budget.parse("macs=70%", COST))
    with pytest.raises(InputError, match=rf"images is {IMAGES}, now 100\."):
        _search(state=state, images=100)
    with pytest.raises(InputError, match="space, the model or the latency table differs"):
        _search(_filtered(SPACE, 20), state=state)
    with pytest.raises(InputError, match="space, the model or the latency table differs"):
        evolve(SPACE, replace(COST, fixed_macs=999), BUDGET, Scorer(), images=IMAGES, settings=SMALL, state=state)


@pytest.mark.parametrize(
    "change",
    [
        {"population": 0},
        {"parents": 0},
        {"mutants": -1},
        {"crossovers": -1},
        {"generations": -1},
        {"parents": 51},
        {"mutants": 26},
        {"mutation_probability": 0},
        {"mutation_probability": 1.1},
        {"window": 1},
        {"window": -0.1},
        {"z": -1},
        {"z": float("nan")},
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(change: dict):
    with pytest.raises(InputError, match=next(iter(change))):
        SearchSettings(**change)


SIZES = [
    ((20, {}), (4, 10, 10)),
    ((7, {}), (1, 3, 3)),
    ((1, {}), (1, 0, 0)),
    ((20, {"parents": 9}), (9, 10, 10)),
    ((20, {"mutants": 4}), (4, 4, 10)),
    ((20, {"mutants": 15}), (4, 15, 5)),
    ((20, {"crossovers": 15}), (4, 5, 15)),
    ((20, {"crossovers": 20}), (4, 0, 20)),
    ((7, {"mutants": 4}), (1, 4, 3)),
    ((20, {"mutants": 3, "crossovers": 2}), (4, 3, 2)),
]


@pytest.mark.parametrize(("given", "expected"), SIZES)
def test_of_size_keeps_the_papers_proportions_beside_what_is_given(given, expected):
    population, sizes = given
    settings = SearchSettings.of_size(population, 3, **sizes)
    assert (settings.parents, settings.mutants, settings.crossovers) == expected
    assert (settings.population, settings.generations) == (population, 3)


def test_of_the_papers_size_are_the_papers_settings():
    assert SearchSettings.of_size(50, 20) == SearchSettings()


@pytest.mark.parametrize(
    "sizes", [{"mutants": 21}, {"crossovers": 21}, {"parents": 21}, {"mutants": 11, "crossovers": 10}]
)
def test_sizes_that_do_not_fit_are_refused_with_all_numbers(sizes: dict):
    with pytest.raises(InputError, match=rf"{next(iter(sizes.values()))}.* population \(20\); lower them or raise"):
        SearchSettings.of_size(20, 3, **sizes)


def test_the_defaults_are_the_papers():
    papers = {"population": 50, "parents": 10, "mutants": 25, "crossovers": 25, "mutation_probability": 0.2}
    assert papers.items() <= asdict(SearchSettings()).items()
    assert SearchSettings().generations == 20


def test_between_equal_scores_the_cheaper_and_then_the_first_by_ranks_is_best():
    def level(configs, start: int, stop: int) -> list[np.ndarray]:
        return [np.ones(stop - start) for _ in configs]

    state = evolve(SPACE, COST, BUDGET, level, images=IMAGES, settings=SMALL)
    by_rank = lambda e: [99 if r == "dense" else r for r in e.ranks.values()]  # noqa: E731
    assert best(state) == min(state.evaluated, key=lambda e: (e.macs, by_rank(e)))


def test_a_search_that_has_not_begun_has_no_best():
    with pytest.raises(InputError, match="nothing yet"):
        best(SearchState(settings=SMALL, budget=BUDGET.text, limit=BUDGET.limit, images=IMAGES, digest=""))


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_the_front_holds_what_nothing_beats_in_cost_and_score(kind):
    states = [_search(budget=Budget.parse(f"macs={share}%", COST)) for share in (50, 65, 80)]
    complete = [e for state in states for e in state.evaluated if e.images == IMAGES]

    def beaten(e) -> bool:
        mine = getattr(e, kind), -e.score
        return any((getattr(o, kind), -o.score) != mine and getattr(o, kind) <= mine[0] and -o.score <= mine[1]
                   for o in complete)  # fmt: skip

    front = pareto(states, kind)
    assert {(getattr(e, kind), e.score) for e in front} == {
        (getattr(e, kind), e.score) for e in complete if not beaten(e)
    }
    assert [getattr(e, kind) for e in front] == sorted({getattr(e, kind) for e in front})


def test_scores_on_different_images_are_not_compared():
    with pytest.raises(InputError, match="same images"):
        pareto([_search(), _search(images=100)], "macs")
