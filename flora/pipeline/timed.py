"""Budgets of time in a compression: by which latency table they go, and an export that is measured as the table was."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from flora.errors import InputError
from flora.lowrank.checkpoint import LoadedModel
from flora.lowrank.targets import find_targets, trace_cost
from flora.pipeline.export_request import ExportRequest
from flora.pipeline.latency import LatencyRequest, load_table, measure_latency
from flora.pipeline.notes import AskedLatency
from flora.ranks.budget import (
    Budget,
    LatencyBudget,
    asks_for_drop,
    asks_for_latency,
    check_reachable,
    drop_parts,
    latency_parts,
)
from flora.ranks.config import RankConfig
from flora.ranks.cost import ModelCost
from flora.ranks.latency import LatencyModel, LatencyTable
from flora.ranks.space import SearchSpace
from flora.training.processes import is_main, wait


def latency_request(budget: str, layers: tuple[str, ...], export: ExportRequest) -> LatencyRequest | None:
    """The measurement that a budget in milliseconds or points goes by; None for another budget."""
    if asks_for_latency(budget):
        _, _, batch = latency_parts(budget)
    elif asks_for_drop(budget):
        _, batch = drop_parts(budget)
    else:
        return None
    threads = export.threads or 1
    return LatencyRequest(layers=layers, runtime=export.runtime, batches=(batch,), threads=threads, forgets=True)


class BudgetRequest(Protocol):
    """What a compression is asked for, as far as its budget goes."""

    @property
    def layers(self) -> tuple[str, ...]: ...

    @property
    def budget(self) -> str: ...

    @property
    def latency_table(self) -> Path | None: ...

    @property
    def latency(self) -> LatencyRequest | None: ...

    def space_of(self, cost: ModelCost) -> SearchSpace: ...


def check_budget(model: LoadedModel, request: BudgetRequest) -> ModelCost:
    """The model's cost; `InputError` for a budget out of reach, and for a table of elsewhere or that serves nothing.

    A budget of time without a table can be checked only when one is measured (`check_latency`).
    """
    if model.config.ranks:
        raise InputError(f"{model.folder} is factorized already; compress the dense model.")
    cost = trace_cost(model.module, find_targets(model.module, request.layers), model.config.preprocessing.input_size)
    space = request.space_of(cost)
    if request.latency is None:
        check_reachable(Budget.parse(request.budget, cost), space, cost)
        if request.latency_table is not None:
            raise InputError(
                "A latency table serves a budget in milliseconds or points, such as latency=0.6x or drop=0.5; "
                f"{request.budget} is none."
            )
    elif request.latency_table is not None:
        table = load_table(request.latency_table, model.config.model, cost, request.latency)
        check_latency(request.budget, table, request.latency, space, cost)
    return cost


def table_of(
    model: LoadedModel, cost: ModelCost, request: BudgetRequest, steps: Path, on_step: Callable[[str], None]
) -> tuple[LatencyTable | None, Path | None]:
    """The table that the budget goes by, and its file: the given one, or one that is measured and kept among `steps`.

    None for a budget that goes by none. `InputError` for a budget of time that no subnet meets.
    """
    latency = request.latency
    if latency is None:
        return None, None
    file = request.latency_table
    if file is not None:
        return load_table(file, model.config.model, cost, latency), file  # which `check_budget` has held against both
    (batch,) = latency.batches
    file = steps / f"latency-{latency.runtime}-b{batch}.json"
    if is_main():
        measure_latency(
            model,
            file,
            latency,
            on_group=lambda done, of, what: on_step(f"measuring latency: {done} of {of} groups, {what}"),
        )
    wait()
    table = LatencyTable.load(file)
    check_latency(request.budget, table, latency, request.space_of(cost), cost)
    return table, file


def check_latency(
    budget: str, table: LatencyTable, request: LatencyRequest, space: SearchSpace, cost: ModelCost
) -> None:
    """Raise `InputError` for a budget of time that no subnet of `space` meets, and for a table without its batch."""
    if asks_for_drop(budget):
        LatencyModel(table, batch=request.batches[0])
    else:
        check_reachable(LatencyBudget.parse(budget, table), space, cost)


def timed_export(
    export: ExportRequest, request: LatencyRequest | None, ranks: RankConfig, table: LatencyTable | None
) -> ExportRequest:
    """The export, measured as the latency of `ranks` was predicted, and told what was asked for."""
    if request is None or table is None or ranks.latency_ms is None or ranks.budget is None:
        return export
    (batch,) = request.batches
    smallest, _, largest = export.batches
    dense_ms = LatencyModel(table, batch=batch).dense_ms
    return replace(
        export,
        batches=(smallest, batch, max(largest, batch)),
        threads=request.threads,
        asked=AskedLatency(
            budget=ranks.budget, predicted_ms=ranks.latency_ms, dense_ms=dense_ms, threads=request.threads
        ),
    )
