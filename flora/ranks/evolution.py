"""FLORA's evolutionary search (arXiv 2311.03912) for the best rank config within a budget, resumable to the bit.

Generation 0 draws configs inside the budget; each later one breeds mutants and crossovers of the best and fills up with
new draws. Three things differ from the released code: random configs are drawn inside the budget instead of by trial,
crossover exchanges whole blocks and so never leaves a filtered space, and a generation is raced (`flora.ranks.race`)
instead of scoring every config on every image. Each generation has a random generator of its own, made from the seed,
the budget and its number, so that a saved state needs none.
"""

import hashlib
import json
import logging
import math
import random
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flora.artifact import Document, new_file
from flora.errors import InputError
from flora.ranks.budget import CostKind, Limit
from flora.ranks.cost import ModelCost, Rank
from flora.ranks.race import Evaluate, race
from flora.ranks.sampling import BudgetSampler
from flora.ranks.space import SearchSpace

log = logging.getLogger(__name__)

Origin = Literal["initial", "random", "mutation", "crossover"]
ATTEMPTS = 20
# What reading a damaged or foreign file can raise: zip, checksum, header, key, and an array instead of an archive.
UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The paper's settings: 50 configs in each of 20 generations after the first, bred from the 10 best so far.

    `window` is the share of the budget below it in which configs are looked for; `halving` races each generation with
    `z` standard errors, without it every config is scored on all images.
    """

    population: int = 50
    parents: int = 10
    mutants: int = 25
    crossovers: int = 25
    generations: int = 20
    mutation_probability: float = 0.2
    window: float = 0.05
    seed: int = 0
    z: float = 2.58
    halving: bool = True

    @classmethod
    def of_size(
        cls,
        population: int,
        generations: int,
        *,
        parents: int | None = None,
        mutants: int | None = None,
        crossovers: int | None = None,
        **others: Any,
    ) -> "SearchSettings":
        """The paper's proportions at another size: half mutants, half crossovers, a fifth of them parents.

        Where more than half are to be of one kind, the other gets what is left.
        """
        half = population // 2
        if mutants is None:
            mutants = half if crossovers is None else max(0, min(half, population - crossovers))
        return cls(
            population=population,
            parents=max(1, population // 5) if parents is None else parents,
            mutants=mutants,
            crossovers=max(0, min(half, population - mutants)) if crossovers is None else crossovers,
            generations=generations,
            **others,
        )

    def __post_init__(self) -> None:
        if min(self.population, self.parents) < 1 or min(self.mutants, self.crossovers, self.generations) < 0:
            raise InputError(
                f"population and parents are at least 1, mutants, crossovers and generations at least 0; got {self}."
            )
        if self.parents > self.population or self.mutants + self.crossovers > self.population:
            raise InputError(
                f"parents ({self.parents}) and mutants + crossovers ({self.mutants} + {self.crossovers}) are at most "
                f"the population ({self.population}); lower them or raise --population."
            )
        if not 0 < self.mutation_probability <= 1:
            raise InputError(f"mutation_probability lies above 0 and at most at 1, got {self.mutation_probability}.")
        if not (0 <= self.window < 1 and 0 <= self.z < math.inf):
            raise InputError(f"window lies in [0, 1) and z is not negative, got {self.window} and {self.z}.")


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A config with the mean score of the first `images` images, and the generation and way in which it was found."""

    ranks: dict[str, Rank]
    macs: int
    params: int
    images: int
    score: float
    generation: int
    origin: Origin


class _StateFile(Document):
    """The JSON part of a state file; ranks are listed in the order of `layers`."""

    settings: SearchSettings
    budget: str
    limit: int
    images: int
    digest: str
    generation: int
    image_forwards: int
    exhausted: bool
    layers: tuple[str, ...]
    evaluated: tuple[tuple[tuple[Rank, ...], int, int, int, float, int, Origin], ...]
    parents: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchState:
    """All that a search needs to go on, after `generation` (-1: nothing was evaluated yet).

    `evaluated` holds every config met, `parents` the places in it of the best ones, best first, and `parent_scores`
    their scores on all images, [parents, images]. `image_forwards` counts what was spent. `exhausted`: the search ended
    early, because no config within the budget was left to find. `budget` is as the user writes it, and `limit` what it
    comes to; `digest` is that of the space, the cost, and what the budget counts.
    """

    settings: SearchSettings
    budget: str
    limit: int
    images: int
    digest: str
    generation: int = -1
    evaluated: tuple[Evaluated, ...] = ()
    parents: tuple[int, ...] = ()
    parent_scores: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    image_forwards: int = 0
    exhausted: bool = False

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.exhausted or self.generation >= self.settings.generations

    def save(self, path: Path) -> None:
        """Write the state to one file, atomically and without pickle."""
        document = _StateFile(
            settings=self.settings,
            budget=self.budget,
            limit=self.limit,
            images=self.images,
            digest=self.digest,
            generation=self.generation,
            image_forwards=self.image_forwards,
            exhausted=self.exhausted,
            layers=tuple(self.evaluated[0].ranks) if self.evaluated else (),
            evaluated=tuple(
                (tuple(e.ranks.values()), e.macs, e.params, e.images, e.score, e.generation, e.origin)
                for e in self.evaluated
            ),
            parents=self.parents,
        )
        text = np.frombuffer(document.model_dump_json().encode(), np.uint8)
        with new_file(path) as partial, partial.open("wb") as file:
            np.savez(file, state=text, parent_scores=self.parent_scores)

    @classmethod
    def load(cls, path: Path) -> "SearchState":
        """Read a state; `InputError` for a file that is no state, or not a whole one."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if damaged := file.zip.testzip():
                    raise ValueError(f"{damaged} is damaged")
                text, parent_scores = file["state"].tobytes().decode(), file["parent_scores"]
        except FileNotFoundError as error:
            raise InputError(f"{path} does not exist.") from error
        except UNREADABLE as error:
            raise InputError(f"{path} is no whole search state: {error}. Start the search anew.") from error
        document = _StateFile.parse(text, origin=str(path))
        fields = dict(document)
        del fields["schema_version"]
        layers, evaluated = fields.pop("layers"), fields.pop("evaluated")
        if (
            parent_scores.dtype != np.float32
            or parent_scores.shape != (len(document.parents), document.images if document.parents else 0)
            or any(not 0 <= i < len(evaluated) for i in document.parents)
            or any(len(ranks) != len(layers) for ranks, *_ in evaluated)
        ):
            raise InputError(f"{path} is no whole search state: its parts do not fit together. Start the search anew.")
        names = ("macs", "params", "images", "score", "generation", "origin")
        return cls(
            **fields,
            evaluated=tuple(
                Evaluated(ranks=dict(zip(layers, ranks, strict=True)), **dict(zip(names, rest, strict=True)))
                for ranks, *rest in evaluated
            ),
            parent_scores=parent_scores,
        )


def mutate(parent: Mapping[str, Rank], space: SearchSpace, rng: random.Random, p: float) -> dict[str, Rank]:
    """`parent` with each block replaced, with probability `p`, by a uniform draw of the block's candidates."""
    child = dict(parent)
    for index, block in enumerate(space.blocks):
        if rng.random() < p:
            if space.candidates is None:
                child.update({name: rng.choice(space.choices[name]) for name in block})
            else:
                child.update(zip(block, rng.choice(space.candidates[index]), strict=True))
    return child


def crossover(a: Mapping[str, Rank], b: Mapping[str, Rank], space: SearchSpace, rng: random.Random) -> dict[str, Rank]:
    """Each block as it is in one of the two, at even odds."""
    child = dict(a)
    for block in space.blocks:
        if rng.random() < 0.5:
            child.update({name: b[name] for name in block})
    return child


def evolve(
    space: SearchSpace,
    cost: ModelCost,
    budget: Limit,
    evaluate: Evaluate,
    *,
    images: int,
    settings: SearchSettings,
    initial: Sequence[Mapping[str, Rank]] = (),
    state: SearchState | None = None,
    on_generation: Callable[[SearchState], None] = lambda state: None,
) -> SearchState:
    """Search, or go on from `state`, and call `on_generation` with the new state after each generation.

    Of the `initial` configs those count that lie in the space and within the budget. A search that is interrupted
    and goes on from its last state ends in the same state as one that is not. `InputError` for a state of another
    search, and for a budget that no subnet meets.
    """
    sampler = BudgetSampler(space, cost, budget, window=settings.window)
    digest = _digest(space, cost, budget)
    fresh = SearchState(settings=settings, budget=budget.text, limit=budget.limit, images=images, digest=digest)
    if state is None:
        state = fresh
    else:
        _check_same(state, fresh)
    while not state.done:
        state = _next(state, _new_configs(state, space, cost, budget, sampler, initial), cost, budget, evaluate)
        on_generation(state)
    return state


def best(state: SearchState) -> Evaluated:
    """The fully evaluated config with the highest score; between equal ones the cheaper, then the first by ranks."""
    if not state.parents:
        raise InputError("The search has evaluated nothing yet; run at least its first generation.")
    return state.evaluated[state.parents[0]]


def pareto(states: Sequence[SearchState], cost_kind: CostKind) -> list[Evaluated]:
    """The fully evaluated configs of several searches that none beats in both cost and score, by ascending cost."""
    if len({state.images for state in states}) > 1:
        raise InputError("Scores on different numbers of images cannot be compared; search with the same images.")
    front: list[Evaluated] = []
    complete = [e for state in states for e in state.evaluated if e.images == state.images]
    for config in sorted(complete, key=lambda e: (getattr(e, cost_kind), -e.score, _by_ranks(e.ranks))):
        if not front or config.score > front[-1].score:
            front.append(config)
    return front


def _next(
    state: SearchState,
    configs: Sequence[tuple[dict[str, Rank], Origin]],
    cost: ModelCost,
    budget: Limit,
    evaluate: Evaluate,
) -> SearchState:
    """The state after evaluating `configs` as the next generation."""
    if not configs:
        return replace(state, exhausted=True)
    settings, generation = state.settings, state.generation + 1
    raced = race(
        [ranks for ranks, _ in configs],
        evaluate,
        images=state.images,
        keep=settings.parents,
        rungs=None if settings.halving else (state.images,),
        incumbents=list(state.parent_scores),
        z=settings.z,
    )
    evaluated = state.evaluated + tuple(
        Evaluated(
            ranks=one.ranks,
            macs=cost.macs(one.ranks),
            params=cost.params(one.ranks),
            images=one.images,
            score=one.score,
            generation=generation,
            origin=origin,
        )
        for one, (_, origin) in zip(raced, configs, strict=True)
    )
    scores = dict(zip(state.parents, state.parent_scores, strict=True))
    scores |= {i: one.scores for i, one in enumerate(raced, len(state.evaluated)) if one.images == state.images}

    def order(i: int) -> tuple[float, int, tuple[float, ...]]:
        ranks = evaluated[i].ranks
        return -evaluated[i].score, budget.cost_of(cost, ranks), _by_ranks(ranks)

    parents = tuple(sorted(scores, key=order)[: settings.parents])
    return replace(
        state,
        generation=generation,
        evaluated=evaluated,
        parents=parents,
        parent_scores=np.stack([scores[i] for i in parents]),
        image_forwards=state.image_forwards + sum(one.images for one in raced),
    )


def _new_configs(
    state: SearchState,
    space: SearchSpace,
    cost: ModelCost,
    budget: Limit,
    sampler: BudgetSampler,
    initial: Sequence[Mapping[str, Rank]],
) -> list[tuple[dict[str, Rank], Origin]]:
    """The unseen configs of the next generation, fewer than the population where bounded attempts find no more."""
    settings = state.settings
    rng = random.Random(f"{settings.seed}/{state.budget}/{state.generation + 1}")
    parents = [state.evaluated[i].ranks for i in state.parents]
    seen = {tuple(config.ranks.values()) for config in state.evaluated}
    configs: list[tuple[dict[str, Rank], Origin]] = []

    def add(ranks: Mapping[str, Rank], origin: Origin) -> bool:
        key = tuple(ranks[name] for name in space.choices)
        if key in seen:
            return False
        seen.add(key)
        configs.append((dict(zip(space.choices, key, strict=True)), origin))
        return True

    def breed(count: int, origin: Origin, child: Callable[[], Mapping[str, Rank]]) -> None:
        for _ in range(ATTEMPTS * count):
            ranks = child()
            if sampler.lowest <= budget.cost_of(cost, ranks) <= sampler.limit:
                count -= add(ranks, origin)
            if not count:
                return

    if not parents:
        for ranks in initial:
            fits = ranks in space and budget.cost_of(cost, ranks) <= sampler.limit
            if not (fits and len(configs) < settings.population and add(ranks, "initial")):
                log.info("an initial config is left out: outside the space or the budget, or there twice")
    else:
        breed(
            settings.mutants,
            "mutation",
            lambda: mutate(rng.choice(parents), space, rng, settings.mutation_probability),
        )
    if len(parents) > 1:
        breed(settings.crossovers, "crossover", lambda: _child_of_two(parents, space, rng))
    for _ in range(ATTEMPTS * (settings.population - len(configs))):
        if len(configs) < settings.population:
            add(sampler.sample(rng), "random")
    return configs


def _child_of_two(parents: Sequence[Mapping[str, Rank]], space: SearchSpace, rng: random.Random) -> dict[str, Rank]:
    a, b = rng.sample(parents, 2)
    return crossover(a, b, space, rng)


def _check_same(state: SearchState, fresh: SearchState) -> None:
    """Raise `InputError` naming what differs when `state` is of another search than `fresh`."""

    def facts(of: SearchState) -> dict[str, object]:
        return {**asdict(of.settings), "budget": f"{of.budget} ({of.limit:,})", "images": of.images}

    mine, theirs = facts(fresh), facts(state)
    differing = [f"{name} is {theirs[name]}, now {mine[name]}" for name in mine if mine[name] != theirs[name]]
    if state.digest != fresh.digest:
        differing.append("the search space, the model or the latency table differs")
    if differing:
        raise InputError(
            f"The search state is of another search: {'; '.join(differing)}. Give the same again, or start anew."
        )


def _digest(space: SearchSpace, cost: ModelCost, budget: Limit) -> str:
    """What a state remembers of the space and the model it was made for, and of what the budget counts."""
    facts = [space.model_dump(mode="json"), asdict(cost), budget.counts]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _by_ranks(ranks: Mapping[str, Rank]) -> tuple[float, ...]:
    """The ranks as numbers that compare, dense above all."""
    return tuple(math.inf if rank == "dense" else rank for rank in ranks.values())
