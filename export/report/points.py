"""What of a bundle can stand in a plot of accuracy against cost."""

from collections.abc import Sequence

from export.bundle import ArtifactEntry, Manifest
from export.report.facts import ArtifactRow, lowrank_stage
from export.report.scatter import Point

COSTS = {
    "latency": "share of the dense model's time",
    "macs": "MACs of one image",
    "size": "MiB of the file",
}
MIB = 2**20


def accuracy_of(manifest: Manifest, row: ArtifactRow) -> tuple[float, float | None] | None:
    """Top-1 in percent with its standard error, of images without labels agreement; None where none is certified."""
    if row.stage is None or not row.is_certified or manifest.verification is None:
        return None
    stages = manifest.verification.stages
    if (top1 := stages[row.stage[2]].top1) is not None:
        return top1, stages[row.stage[2]].top1_standard_error
    if row.entry.role == "yardstick":
        return 100.0, None
    against_dense = lowrank_stage(manifest, row.entry.name)
    agreement = None if against_dense is None else stages[against_dense].agreement
    return None if agreement is None else (100 * agreement, None)


def is_labelled(manifest: Manifest) -> bool:
    """Whether accuracy was measured, or agreement with the dense model stands in for it."""
    return manifest.verification is not None and manifest.verification.stages[0].top1 is not None


def cost_of(manifest: Manifest, entry: ArtifactEntry, cost: str) -> float | None:
    """One of `COSTS` of an artefact, None where it was not measured."""
    if cost == "latency":
        stats = manifest.latency.get(entry.name)
        return stats.ratio if stats else None
    return entry.macs if cost == "macs" else entry.size_bytes / MIB


def points_of(manifest: Manifest, rows: Sequence[ArtifactRow], cost: str) -> list[Point]:
    """What of a bundle can be shown in a plot of accuracy against `cost`."""
    points = []
    for row in rows:
        accuracy, spent = accuracy_of(manifest, row), cost_of(manifest, row.entry, cost)
        if accuracy is not None and spent is not None:
            role = "failed" if row.entry.status == "failed" else row.entry.role
            points.append(Point(label=row.label, role=role, accuracy=accuracy[0], error=accuracy[1], cost=spent))
    return points
