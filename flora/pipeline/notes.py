"""The notes of a bundle: what its user should know that no figure says."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from export.benchmark import LatencyStats
from export.verify import VerifyReport
from flora.errors import few
from flora.imagesets import ImageSetRecord
from flora.lowrank.checkpoint import LoadedModel, ModelConfig
from flora.lowrank.targets import trace_cost
from flora.pipeline.images import MOST_DIGESTS
from flora.ranks.budget import asks_for_drop, latency_parts
from flora.ranks.cost import ModelCost

# So far predictions may be off, as a share of the measured latency.
UNCERTAINTY = 0.05


@dataclass(frozen=True, kw_only=True)
class AskedLatency:
    """The budget that ranks were chosen for, and what the latency model predicts for one batch."""

    budget: str
    predicted_ms: float
    dense_ms: float
    threads: int

    def outcome(self, measured: LatencyStats, runner: str) -> str:
        """Whether the exported model takes the time that was asked for; `runner` is what it was measured on."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        said = (
            f"Asked was {self.budget}. Predicted were {self.predicted_ms / self.dense_ms:.3f} of the dense model's "
            f"time ({self.predicted_ms:.3g} ms), measured {measured.ratio:.3f} ({measured.median_ms:.3g} ms) at batch "
            f"{measured.batch_size} and {threads} for {runner}"
        )
        if asks_for_drop(self.budget):
            return f"{said}."
        amount, unit, _ = latency_parts(self.budget)
        over = (measured.ratio if unit == "x" else measured.median_ms) / amount - 1
        if over <= 0:
            return f"{said}: the budget is met."
        if over <= UNCERTAINTY:
            return f"{said}: the budget is missed by {over:.1%}, which predictions may be off by."
        return f"{said}: the budget is missed by {over:.0%}. If the device was busy, measure again; else ask for less."


def notes_on(
    config: ModelConfig,
    dense: LoadedModel | None,
    report: VerifyReport,
    evaluation: ImageSetRecord,
    seen: Mapping[Any, ImageSetRecord],
    *,
    certifies: bool,
) -> Iterator[str]:
    """What the model was made from, and what was not verified. `certifies`: no choice was made on the images."""
    if dense is None and config.ranks:
        yield (
            "The dense reference was not found: what low rank costs in accuracy is not verified. "
            "Name it with --reference."
        )
    if dense is not None and (lacking := _layers_with_few_tokens(config, dense)):
        yield note_on_few_tokens(lacking)
    if (fitted := config.compensation) is not None:
        verb = "were fitted again" if fitted.helps else "were left as they were, for fitting them again did not help"
        yield (
            f"The factors {verb} on {fitted.images} calibration images: on the selection images the divergence from "
            f"the dense model is {fitted.before:.3g} nats before and {fitted.after:.3g} after."
        )
    if not certifies:
        yield (
            "No evaluation images were given. The figures are of the selection images, by which the model was chosen, "
            "so they flatter it; certify it on others: flora verify BUNDLE --data IMAGES."
        )
    if report.stages[0].top1 is None:
        yield "The images have no labels: agreement with the dense model stands in for accuracy."
    if certifies and (unchecked := list(_unchecked(seen, evaluation))):
        yield (
            f"Without the digests of all images, streamed or above {MOST_DIGESTS:,} for training, it was not checked "
            f"whether evaluation images are among the {' and the '.join(unchecked)}."
        )


def note_on_drift(latency: Mapping[str, LatencyStats]) -> str | None:
    """That latency still drifted while it was measured, where it did."""
    if all(one.steady for one in latency.values()):
        return None
    return (
        "The device was too busy for latency to settle, so its ratios may be off. Measure again when nothing else "
        "runs: flora bench BUNDLE."
    )


def note_on_few_tokens(layers: list[str]) -> str:
    """That the statistics of `layers` have no full rank."""
    return (
        f"The calibration images give {few(layers)} fewer tokens than inputs, so they show these layers in part "
        "only. Give more calibration images."
    )


def note_on_pivots(layers: list[str]) -> str:
    """That `layers` could not be pivoted."""
    return (
        f"Rounding errors would grow too much in the pivoted form of {few(layers)}: two factors were exported, or "
        "their product where it is cheaper, so these layers are slower than predicted."
    )


def layers_with_few_tokens(cost: ModelCost, images: int) -> list[str]:
    """The layers of which `images` show fewer tokens than they have inputs: their statistics have no full rank."""
    return [layer.name for layer in cost.layers if images * layer.tokens < layer.in_features]


def _layers_with_few_tokens(config: ModelConfig, dense: LoadedModel) -> list[str]:
    calibration = config.image_sets.get("calibration")
    if calibration is None or not config.ranks:
        return []
    cost = trace_cost(dense.module, list(config.ranks), config.preprocessing.input_size)
    return layers_with_few_tokens(cost, calibration.images)


def _unchecked(seen: Mapping[Any, ImageSetRecord], evaluation: ImageSetRecord) -> Iterator[str]:
    for role, record in seen.items():
        if record.image_digests is None or evaluation.image_digests is None:
            yield f"{role} images ({record.spec})"
