"""Budgets of time in a compression: by which latency table they go, and an export that is measured as the table was."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flora.errors import InputError
from flora.lowrank.checkpoint import LoadedModel
from flora.pipeline.export import ExportRequest
from flora.pipeline.latency import LatencyRequest, load_table, measure_latency
from flora.pipeline.notes import AskedLatency
from flora.ranks.budget import LATENCY, drop_parts, latency_parts
from flora.ranks.config import RankConfig
from flora.ranks.cost import ModelCost
from flora.ranks.latency import LatencyModel, LatencyTable
from flora.training.processes import is_main, wait


def latency_request(budget: str, layers: tuple[str, ...], export: ExportRequest) -> LatencyRequest | None:
    """The measurement that a budget in milliseconds or points goes by; None for another budget."""
    if budget.startswith(LATENCY):
        _, _, batch = latency_parts(budget)
    elif asks_for_drop(budget):
        _, batch = drop_parts(budget)
    else:
        return None
    return LatencyRequest(layers=layers, runtime=export.runtime, batches=(batch,), threads=export.threads or 1)


def asks_for_drop(budget: str) -> bool:
    """Whether the budget is one of accuracy: then the fastest model within it is looked for."""
    return budget.startswith("drop=")


def refuse_needless_table(file: Path | None, budget: str, request: LatencyRequest | None) -> None:
    """Raise `InputError` for a table that the budget has no use for."""
    if file is not None and request is None:
        raise InputError(
            f"A latency table serves a budget in milliseconds or points, such as latency=0.6x or drop=0.5; {budget} is "
            "none."
        )


def table_here(
    model: LoadedModel,
    cost: ModelCost,
    file: Path | None,
    request: LatencyRequest,
    steps: Path,
    on_step: Callable[[str], None],
) -> tuple[LatencyTable, Path]:
    """The table in `file`, or without one a table that is measured and kept among the `steps`; and its file."""
    if file is not None:
        return load_table(file, model.config.model, cost, request), file
    (batch,) = request.batches
    file = steps / f"latency-{request.runtime}-b{batch}.json"
    if is_main():
        measure_latency(
            model,
            file,
            request,
            on_group=lambda done, of, what: on_step(f"measuring latency: {done} of {of} groups, {what}"),
        )
    wait()
    return LatencyTable.load(file), file


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
        asked=AskedLatency(budget=ranks.budget, predicted_ms=ranks.latency_ms, dense_ms=dense_ms),
    )
