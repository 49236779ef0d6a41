"""Several bundles on one page: which is worth its time, and what of them can be compared at all.

Accuracies are compared where the same images were judged by; latencies where the same dense model was measured beside,
on the same device, runtime and batch. The page says what differs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from export.bundle import Bundle, Manifest
from export.report.facts import ArtifactRow, artifact_rows, lowrank_stage, yardstick_of
from export.report.format import Figures
from export.report.page import page, verdict
from export.report.points import COSTS, is_labelled, points_of
from export.report.scatter import Point, accuracy_against, front_of


@dataclass(frozen=True, kw_only=True)
class Member:
    """One bundle by its place on the page, with the file that stands for it."""

    place: int
    name: str
    manifest: Manifest
    row: ArtifactRow

    @property
    def passed(self) -> bool:
        """Whether the gate let all of it pass."""
        return self.manifest.verification is not None and self.manifest.verification.passed and not self.manifest.unmet

    def point(self, cost: str) -> Point | None:
        """Where it stands in a plot of accuracy against `cost`."""
        for point in points_of(self.manifest, [self.row], cost):
            return Point(
                label=self.name,
                role="failed" if point.role == "failed" else "candidate",
                accuracy=point.accuracy,
                error=point.error,
                cost=point.cost,
            )
        return None


Group = list[Member]


def comparison_page(bundles: Sequence[Bundle]) -> str:
    """The page of two or more bundles."""
    members = [
        Member(place=place, name=name, manifest=bundle.manifest, row=_standing_for(bundle.manifest))
        for place, (name, bundle) in enumerate(zip(_names(bundles), bundles, strict=True))
    ]
    by_images, by_device = _grouped(members, _images), _grouped(members, _measured)
    plots, titles = {}, {}
    for cost, groups in (("latency", by_device), ("macs", by_images), ("size", by_images)):
        for number, group in enumerate(groups):
            if points := _points(group, cost):
                accuracy = "top-1, %" if is_labelled(group[0].manifest) else "agreement with the dense model, %"
                plots[f"{cost}-{number}"] = accuracy_against(points, cost=COSTS[cost], accuracy=accuracy)
                titles[f"{cost}-{number}"] = _title(cost, group, groups)
    best = {member.name for group in by_device for member in _front(group)}
    return page(
        "comparison.html.jinja",
        title=f"{len(members)} bundles compared",
        members=members,
        show=Figures([member.manifest.model_dump(mode="json") for member in members]),
        verdict=verdict,
        lowrank_stage=lowrank_stage,
        best=best,
        fastest=_fastest(members) if len(by_device) == 1 else None,
        by_device=by_device,
        by_images=by_images,
        differences=_differences(members),
        plots=plots,
        titles=titles,
    )


def _names(bundles: Sequence[Bundle]) -> list[str]:
    """The folders by their names, or where these are not unique by their paths."""
    names = [bundle.folder.resolve().name for bundle in bundles]
    return names if len(set(names)) == len(names) else [str(bundle.folder) for bundle in bundles]


def _standing_for(manifest: Manifest) -> ArtifactRow:
    """The file that is to be shipped or, where that is the dense one, the candidate in FP32."""
    rows = artifact_rows(manifest)
    candidates = [row for row in rows if row.entry.kind == "onnx" and row.entry.role == "candidate"]
    shipped = [row for row in candidates if row.entry.name == manifest.recommended]
    return next(iter([*shipped, *candidates, *rows]))


def _grouped(members: Sequence[Member], key: Callable[[Member], Any]) -> list[Group]:
    groups: dict[Any, Group] = {}
    for member in members:
        groups.setdefault(key(member), []).append(member)
    return list(groups.values())


def _images(member: Member) -> Any:
    """What accuracy depends on besides the model."""
    record = member.manifest.image_sets.get("evaluation") or member.manifest.image_sets.get("selection")
    judged = member.manifest.verification.stages[0].images if member.manifest.verification else 0
    return (record.digest or record.spec) if record else None, judged, is_labelled(member.manifest)


def _measured(member: Member) -> Any:
    """What a latency ratio depends on besides the file: the dense one beside it, the device, the runtime, the batch."""
    manifest, entry = member.manifest, member.row.entry
    yardstick = yardstick_of(manifest)
    stats = manifest.latency.get(entry.name)
    return (
        _images(member),
        yardstick.sha256 if yardstick else manifest.model,
        tuple(sorted(manifest.device.items())),
        entry.runtime,
        stats.batch_size if stats else None,
    )


def _points(group: Group, cost: str) -> list[Point]:
    """The members of a group, and the dense models beside them, each once."""
    dense = {
        row.entry.sha256: point
        for member in group
        for row in artifact_rows(member.manifest)
        if row.entry.role == "yardstick"
        for point in points_of(member.manifest, [row], cost)
    }
    return [*dense.values(), *(point for member in group if (point := member.point(cost)))]


def _front(group: Group) -> list[Member]:
    """The members that neither another one nor a dense model beats in accuracy and latency."""
    labels = {point.label for point in front_of(_points(group, "latency"))}
    return [member for member in group if member.name in labels]


def _fastest(members: Sequence[Member]) -> Member | None:
    """Of those that passed and are to be shipped the fastest."""
    shipped = [
        one
        for one in members
        if one.manifest.recommended == one.row.entry.name and one.row.entry.name in one.manifest.latency
    ]
    return min(shipped, key=lambda member: member.manifest.latency[member.row.entry.name].ratio, default=None)


def _title(cost: str, group: Group, groups: list[Group]) -> str:
    what = {"latency": "Accuracy against latency", "macs": "Accuracy against MACs", "size": "Accuracy against size"}[
        cost
    ]
    return what if len(groups) == 1 else f"{what}: {', '.join(member.name for member in group)}"


def _differences(members: Sequence[Member]) -> dict[str, list[str]]:
    """The facts in which the bundles differ, with each one's, in their order."""
    facts: dict[str, list[str]] = {}
    described = [_described(member) for member in members]
    for name in dict.fromkeys(name for one in described for name in one):
        values = [one.get(name, "none") for one in described]
        if len(set(values)) > 1:
            facts[name] = values
    return facts


def _described(member: Member) -> dict[str, str]:
    manifest, stats = member.manifest, member.manifest.latency.get(member.row.entry.name)
    yardstick = yardstick_of(manifest)
    record = manifest.image_sets.get("evaluation") or manifest.image_sets.get("selection")
    return {
        "model": manifest.model,
        "dense file": yardstick.sha256[:12] if yardstick else "none",
        "images judged by": f"{record.spec} ({(record.digest or 'no digest')[:12]})" if record else "none",
        "runtime": member.row.entry.runtime,
        "batch": str(stats.batch_size) if stats else "none",
        **manifest.device,
        **{name: version for name, version in manifest.versions.items() if "runtime" in name or "openvino" in name},
    }
