"""Searching a supernet for the best ranks within budgets: resumable, on one process or many."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from flora.artifact import Document, check_replaceable, new_folder
from flora.errors import InputError
from flora.imagesets import ImageSetRecord
from flora.lowrank.checkpoint import FILTER_REPORT, LoadedSupernet, content_digest, load_supernet
from flora.pipeline.compact import config_within
from flora.pipeline.figures import write_figures
from flora.pipeline.filter import FilterReport
from flora.pipeline.images import identity
from flora.pipeline.job import OnStart, begin
from flora.pipeline.latency import load_table
from flora.ranks.allocate import Choice, allocate
from flora.ranks.budget import Budget, LatencyBudget, Limit, asks_for_latency, check_reachable
from flora.ranks.config import RankConfig
from flora.ranks.cost import ModelCost, Rank
from flora.ranks.evolution import Evaluated, SearchSettings, SearchState, best, evolve, pareto
from flora.ranks.latency import LatencyModel, LatencyTable
from flora.ranks.space import SearchSpace
from flora.resume import SETTINGS, Job
from flora.training.data import TimmImages
from flora.training.processes import is_main, processes, wait
from flora.training.selection import Fitness, SelectionImages, SubnetScores, check_fitness

PARETO = "pareto.json"
HISTORY = "history.json"
FIGURES = "figures.html"
STARTS = 8


class ParetoPoint(BaseModel):
    """A config that no other one found beats in both MACs and score; its layers count as two factors, never pivoted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    macs: int
    params: int
    score: float
    ranks: dict[str, Rank]


class ParetoSet(Document):
    """`pareto.json`: ascending in MACs; `score` is the mean fitness over the selection images."""

    kind: Literal["flora pareto set"] = "flora pareto set"
    model: str
    fitness: str
    points: tuple[ParetoPoint, ...]


class GenerationRecord(BaseModel):
    """One generation of one budget: the best score so far, and what has been spent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget: str
    generation: int
    evaluated: int
    image_forwards: int
    best_score: float
    best_macs: int


class SearchHistory(Document):
    """`history.json`: every generation, by budget."""

    kind: Literal["flora search history"] = "flora search history"
    generations: tuple[GenerationRecord, ...]


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What to search on and for; `budgets` as the user writes them (`macs=50%`), those of latency by the table."""

    select_data: str
    budgets: tuple[str, ...]
    latency_table: Path | None = None
    fitness: Fitness = "loss"
    settings: SearchSettings = field(default_factory=SearchSettings)
    device: torch.device | None = None
    batch_size: int = 250
    workers: int = 0
    restart: bool = False


@dataclass(frozen=True, kw_only=True)
class SearchOutcome:
    """What was found for each budget, in the order of the request, and what it took."""

    folder: Path
    configs: dict[str, RankConfig]
    files: dict[str, str]
    pareto: ParetoSet
    image_forwards: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What can be reached, before anything is spent: smallest, middle and largest subnet, and the budgets.

    `latencies` predict, by batch size, for the budgets of latency; each has its fastest subnet among the others.
    """

    subnets: dict[str, dict[str, Rank]]
    budgets: tuple[Limit, ...]
    cost: ModelCost
    table: LatencyTable | None
    latencies: dict[int, LatencyModel]


def plan_search(supernet: LoadedSupernet, budgets: Sequence[str], latency_table: Path | None = None) -> Plan:
    """Parse the budgets and refuse those that no subnet meets, and a latency table that does not serve."""
    config = supernet.config
    space, cost = config.space, config.cost
    table = None if latency_table is None else load_table(latency_table, config.model, cost)
    if table is not None and not any(map(asks_for_latency, budgets)):
        raise InputError(f"A latency table serves a budget such as latency=0.6x; {', '.join(budgets)} is none.")
    parsed = tuple(
        LatencyBudget.parse(text, table) if table and asks_for_latency(text) else Budget.parse(text, cost)
        for text in budgets
    )
    if not parsed:
        raise InputError("A search needs a budget, for example macs=50%.")
    if len({budget.text for budget in parsed}) < len(parsed):
        raise InputError(f"A budget is given twice: {', '.join(budgets)}.")
    for budget in parsed:
        check_reachable(budget, space, cost)
    timed = {budget.latency.batch: budget for budget in parsed if isinstance(budget, LatencyBudget)}
    fastest = {f"fastest at batch {batch}": budget.cheapest(space, cost) for batch, budget in timed.items()}
    return Plan(
        subnets=subnets_within_reach(space, cost) | fastest,
        budgets=parsed,
        cost=cost,
        table=table,
        latencies={batch: budget.latency for batch, budget in timed.items()},
    )


def subnets_within_reach(space: SearchSpace, cost: ModelCost) -> dict[str, dict[str, Rank]]:
    """The smallest, a middle and the largest subnet, by these names."""
    return {"smallest": space.smallest(), "middle": _middle(space, cost), "largest": space.largest()}


def _middle(space: SearchSpace, cost: ModelCost) -> dict[str, Rank]:
    """Of each decision the candidate of median cost."""
    middle: dict[str, Rank] = {}
    for names, options in space.decisions():
        ordered = sorted(
            options, key=lambda ranks: sum(cost.shapes[n].macs(r) for n, r in zip(names, ranks, strict=True))
        )
        middle.update(zip(names, ordered[len(ordered) // 2], strict=True))
    return middle


def search(
    source: Path,
    out: Path,
    request: SearchRequest,
    *,
    on_start: OnStart = lambda done: None,
    on_generation: Callable[[SearchState], None] = lambda state: None,
) -> SearchOutcome:
    """Search the supernet in folder `source` and write the folder `out`; stopped, the same call goes on."""
    check_replaceable(out, marker=PARETO)
    supernet = load_supernet(source)
    plan = plan_search(supernet, request.budgets, request.latency_table)
    budgets = plan.budgets
    processes(request.device)
    config = supernet.config
    source_images = TimmImages(request.select_data, config.preprocessing, workers=request.workers)
    record = source_images.record()
    for role in ("calibration", "training"):
        if role in config.image_sets:
            record.refuse_overlap(config.image_sets[role], own_role="selection", other_role=role)
    images = SelectionImages(source_images, batch_size=request.batch_size)
    check_fitness(request.fitness, source_images, supernet.module)
    job = Job(
        settings={
            "source": content_digest(source),
            "selection": identity(source_images, record),
            "fitness": request.fitness,
            "budgets": request.budgets,
            **({"table": plan.table.digest} if plan.table else {}),
            **asdict(request.settings),
        }
    )
    work = begin(job, out, restart=request.restart, on_start=on_start)
    if work is None:
        return _outcome(out, budgets)
    device = request.device or torch.device("cpu")
    dense = supernet.load_dense().module.to(device) if request.fitness in ("agreement", "distance") else None
    scores = SubnetScores(supernet.module.to(device), images, fitness=request.fitness, dense=dense)
    states: list[SearchState] = []
    generations: list[GenerationRecord] = []
    for budget in budgets:
        file = work.file(f"search-{budget_slug(budget.text)}.npz")

        def note(state: SearchState, file: Path = file) -> None:
            if is_main():
                state.save(file)
            wait()
            on_generation(state)

        states.append(
            evolve(
                config.space,
                config.cost,
                budget,
                scores,
                images=len(images),
                settings=request.settings,
                initial=starting_configs(Path(source), config.space, config.cost, budget),
                state=SearchState.load(file) if file.is_file() else None,
                on_generation=note,
            )
        )
        generations += _history(states[-1])
    configs = {
        budget.text: _rank_config(supernet, budget, best(state), request, record)
        for budget, state in zip(budgets, states, strict=True)
    }
    names = _names(budgets)
    front = ParetoSet(
        model=config.model,
        fitness=request.fitness,
        points=tuple(
            ParetoPoint(macs=one.macs, params=one.params, score=one.score, ranks=one.ranks)
            for one in pareto(states, "macs")
        ),
    )
    if is_main():
        with new_folder(out, marker=PARETO) as folder:
            for text, name in names.items():
                configs[text].save(folder / name)
            SearchHistory(generations=tuple(generations)).save(folder / HISTORY)
            write_figures(folder / FIGURES, configs, states, config.cost, fitness=request.fitness)
            job.save(folder / SETTINGS)
            front.save(folder / PARETO)
        work.remove()
    wait()
    return _outcome(out, budgets)


def _names(budgets: Sequence[Limit]) -> dict[str, str]:
    """The file of each budget's ranks."""
    texts = [budget.text for budget in budgets]
    return {text: "ranks.json" if len(texts) == 1 else f"ranks-{budget_slug(text)}.json" for text in texts}


def _outcome(out: Path, budgets: Sequence[Limit]) -> SearchOutcome:
    """What lies in the folder that a search has written."""
    out, names = Path(out), _names(budgets)
    spent = {record.budget: record.image_forwards for record in SearchHistory.load(out / HISTORY).generations}
    return SearchOutcome(
        folder=out,
        configs={text: RankConfig.load(out / name) for text, name in names.items()},
        files=names,
        pareto=ParetoSet.load(out / PARETO),
        image_forwards=sum(spent.values()),
    )


def starting_configs(source: Path, space: SearchSpace, cost: ModelCost, budget: Limit) -> list[dict[str, Rank]]:
    """Configs to begin with, from the errors that filtering measured: the best ones if errors of blocks add up."""
    if not (source / FILTER_REPORT).is_file():
        return []
    blocks = []
    for scores in FilterReport.load(source / FILTER_REPORT).blocks:
        shapes, kept = [cost.shapes[name] for name in scores.layers], set(scores.kept)
        blocks.append(
            [
                Choice(
                    ranks=dict(zip(scores.layers, candidate, strict=True)),
                    cost=sum(map(budget.layer_cost, shapes, candidate)),
                    error=error,
                )
                for candidate, error in zip(scores.candidates, scores.errors, strict=True)
                if candidate in kept
            ]
        )
    limits = [budget.left_for_layers(cost) - (budget.limit // 200) * i for i in range(STARTS)]
    found = [ranks for limit in limits if (ranks := allocate(blocks, limit)) is not None]
    return [ranks for i, ranks in enumerate(found) if ranks not in found[:i]]


def _rank_config(
    supernet: LoadedSupernet, budget: Limit, found: Evaluated, request: SearchRequest, record: ImageSetRecord
) -> RankConfig:
    origin = f"evolutionary search, fitness {request.fitness}, seed {request.settings.seed}"
    return config_within(supernet.config, found.ranks, budget, origin=origin, score=found.score, selection=record)


def _history(state: SearchState) -> list[GenerationRecord]:
    records = []
    for generation in range(state.generation + 1):
        known = [one for one in state.evaluated if one.generation <= generation]
        complete = [one for one in known if one.images == state.images]
        top = max(complete, key=lambda one: one.score)
        records.append(
            GenerationRecord(
                budget=state.budget,
                generation=generation,
                evaluated=len(known),
                image_forwards=sum(one.images for one in known),
                best_score=top.score,
                best_macs=top.macs,
            )
        )
    return records


def budget_slug(text: str) -> str:
    """A budget as part of a file name: `macs=50%` is `macs-50pct`."""
    return text.replace("=", "-").replace("%", "pct")
