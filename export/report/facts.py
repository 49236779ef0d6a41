"""What a report says of a bundle, gathered from its manifest: artefacts with their stages, layers by block, parts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from export.bundle import ArtifactEntry, LayerEntry, Manifest
from export.thresholds import LIMITED, Thresholds, is_least
from export.verify import StageReport, VerifyReport
from flora.ranks.space import block_name


@dataclass(frozen=True, kw_only=True)
class ArtifactRow:
    """One artefact by its place in the manifest; `stage` is where its accuracy stands, if it was run."""

    place: int
    entry: ArtifactEntry
    label: str
    stage: tuple[str, str, int] | None = None
    images: str | None = None

    @property
    def is_certified(self) -> bool:
        """Whether its accuracy is of the images that nothing was chosen by."""
        return self.stage is not None and self.stage[0] == "verification"


def artifact_rows(manifest: Manifest) -> list[ArtifactRow]:
    """All artefacts, the yardstick first as in the manifest, each with the first of its stages."""
    rows = []
    for place, entry in enumerate(manifest.artifacts):
        stage, images = None, None
        for key, words in (("verification", "evaluation images"), ("selection", "selection images")):
            report: VerifyReport | None = getattr(manifest, key)
            found = _first_stage(report, entry.name) if report else None
            if found is not None:
                stage, images = (key, "stages", found), words
                break
        rows.append(ArtifactRow(place=place, entry=entry, label=label_of(entry), stage=stage, images=images))
    return rows


def label_of(entry: ArtifactEntry) -> str:
    """The artefact in few words, for plots: without its runtime, which is an engine's name."""
    if entry.kind == "engine":
        return PurePosixPath(entry.path).stem
    model = entry.name.partition(",")[0]
    return model.replace(entry.precision, entry.precision.upper())


def _first_stage(report: VerifyReport, name: str) -> int | None:
    """The place of the first stage of the artefact called `name`; stages bear its name and a batch."""
    names = (stage.name for stage in report.stages)
    return next((place for place, stage in enumerate(names) if stage == name or stage.startswith(f"{name},")), None)


def yardstick_of(manifest: Manifest) -> ArtifactEntry | None:
    """What all is compared with: the last yardstick that was measured, as in its latency, else the dense model."""
    first = next(iter(manifest.latency), None)
    named = [entry for entry in manifest.artifacts if entry.name == first]
    return next((entry for entry in named if entry.role == "yardstick"), None)


def lowrank_stage(manifest: Manifest, name: str) -> int | None:
    """The place of the stage that says what the artefact loses against the dense model, all steps together."""
    stages = manifest.verification.stages if manifest.verification else []
    against = [place for place, stage in enumerate(stages) if stage.kind == "lowrank" and stage.compared_with]
    model = name.partition(",")[0]
    own = [place for place in against if stages[place].name.startswith((f"{name},", f"{model}, "))]
    return next(iter(own), None)


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A threshold that a figure of a stage was held against."""

    side: str
    value: float


def limits_of(stage: StageReport, thresholds: Mapping[str, Thresholds]) -> dict[str, Limit]:
    """The thresholds of a stage by figure; of those that it shows no figure for, none."""
    held = thresholds.get(stage.kind)
    if held is None or stage.compared_with is None:
        return {}
    limits = (
        (name, "at least" if is_least(threshold) else "at most", getattr(held, threshold))
        for name, threshold in LIMITED.items()
    )
    return {
        name: Limit(side=side, value=value)
        for name, side, value in limits
        if value is not None and getattr(stage, name) is not None
    }


@dataclass(frozen=True, kw_only=True)
class LayerCell:
    """One layer by its place in the manifest; `rank_shade` and `sensitivity_shade` are from 0 to 1."""

    place: int
    entry: LayerEntry
    rank_shade: float
    sensitivity_shade: float


@dataclass(frozen=True, kw_only=True)
class LayerGrid:
    """Layers by block (rows) and kind (columns)."""

    kinds: list[str]
    rows: dict[str, dict[str, LayerCell]]


def layer_grid(layers: Sequence[LayerEntry]) -> LayerGrid:
    """Ranks are shaded by their share of the full rank over the largest share, sensitivities by their logarithm."""
    logs = [math.log10(layer.sensitivity) for layer in layers if layer.sensitivity]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)
    most = max((_rank_share(layer) for layer in layers), default=1.0)
    kinds: dict[str, None] = {}
    rows: dict[str, dict[str, LayerCell]] = {}
    for place, layer in enumerate(layers):
        block, kind = block_name(layer.name), layer.name.rsplit(".", 1)[-1]
        kinds[kind] = None
        shade = (math.log10(layer.sensitivity) - low) / ((high - low) or 1.0) if layer.sensitivity else 0.0
        rows.setdefault(block, {})[kind] = LayerCell(
            place=place,
            entry=layer,
            rank_shade=_rank_share(layer) / most,
            sensitivity_shade=shade,
        )
    return LayerGrid(kinds=list(kinds), rows=rows)


def _rank_share(layer: LayerEntry) -> float:
    return 1.0 if layer.rank == "dense" else layer.rank / min(layer.in_features, layer.out_features)
