"""Latency tables that were never measured, for this device."""

from pathlib import Path

from flora.lowrank.checkpoint import load_model
from flora.lowrank.targets import find_targets, trace_cost
from flora.pipeline.latency import LatencyRequest
from flora.provenance import device_facts
from flora.ranks.latency import LatencyTable, ModelLatency, Site, SiteLatency
from tests.samples import GREY
from tests.worked_example import WorkedExample

LAYERS = ("qkv", "proj", "fc1", "fc2")


def latency_table(worked: WorkedExample, file: Path, *, pivots: str | None = None) -> LatencyTable:
    """A table for this device on which `fc1` is never faster factorized, and all else in proportion to its MACs.

    The layers that are called `pivots` are fastest in pivoted form.
    """
    model = load_model(str(worked.dense))
    shapes = trace_cost(model.module, find_targets(model.module, LAYERS), GREY.input_size).shapes
    sites = []
    for name, shape in shapes.items():
        site = Site(in_features=shape.in_features, out_features=shape.out_features, tokens=shape.tokens)
        top, dense_ms = shape.break_even_rank, shape.dense_weights / 1e5
        slower = 2.0 if name.endswith("fc1") else 0.0
        times = tuple(dense_ms * (slower + rank / top) for rank in (1, top))
        common = {"site": site, "layers": (name,), "batch": 8, "precision": "fp32", "spread": 0.01}
        if pivots is not None and name.endswith(pivots):
            common |= {"pivoted_ranks": (1, shape.full_rank - 1), "pivoted_ms": (0.1 * dense_ms, 0.3 * dense_ms)}
        sites.append(SiteLatency(dense_ms=dense_ms, ranks=(1, top), ms=times, **common))
    sums = {"dense": sum(one.dense_ms for one in sites), "low": sum(one.at(1) for one in sites)}
    ranks = {"dense": {}, "low": dict.fromkeys(shapes, 1)}
    models = [
        ModelLatency(name=name, ranks=ranks[name], batch=8, precision="fp32", ms=0.1 + total)
        for name, total in sums.items()
    ]
    table = LatencyTable(
        model=model.config.model,
        device=device_facts(),
        runtime=LatencyRequest(layers=LAYERS, threads=1).runtime_facts,
        clocks={},
        sites=tuple(sites),
        models=tuple(models),
        created="now",
    )
    table.save(file)
    return table
