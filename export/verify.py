"""The chain of proof: the same images through every stage, each compared with one before, the first failure named.

A stage is a runner at a batch size. Its kind picks the thresholds that it must hold against the stage it is compared
with. Images are read once; every stage sees the same arrays.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from pydantic import BaseModel, ConfigDict

from export.images import ImageSet
from export.paired import PairedAccuracy
from export.runners import Runner
from export.tally import Tally, WorstImage
from export.thresholds import THRESHOLDS, Thresholds
from flora.errors import InputError, near_matches

LOADED_AT_ONCE = 64
# By so many, top-1 on other images of the same kind may differ.
STANDARD_ERRORS = 4
# Points of top-1 below what is expected, where no drop is limited.
TOLERANCE = 1.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One runner at one batch size; `compared_with` names an earlier stage, None is a start of the chain.

    `expected_top1` in percent, with its standard error in points, is what the model is known to reach on such images.
    """

    name: str
    runner: Runner
    batch_size: int
    kind: str
    compared_with: str | None = None
    expected_top1: float | None = None
    expected_error: float = 0.0


class StageReport(BaseModel):
    """Figures of one stage. `top1`, `top5` are in percent, their error and `drop` in points, `agreement` a share.

    `drop` is that of top-1 against the compared stage on the same images, `drop_low` to `drop_high` its 95 % interval,
    `p_value` that of McNemar's exact test. `cosine` and `kl` are means over images, `max_abs` is the largest difference
    of two logits. `worst` are the images furthest from the compared stage, as far as they differ.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: str
    compared_with: str | None
    provider: str
    batch_size: int
    images: int
    top1: float | None = None
    top1_standard_error: float | None = None
    top5: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    max_abs: float | None = None
    max_relative: float | None = None
    kl: float | None = None
    drop: float | None = None
    drop_low: float | None = None
    drop_high: float | None = None
    p_value: float | None = None
    worst: list[WorstImage] = []
    passed: bool
    failures: list[str]
    notes: list[str] = []


class VerifyReport(BaseModel):
    """All stages in the order they ran."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stages: list[StageReport]

    @property
    def passed(self) -> bool:
        return all(stage.passed for stage in self.stages)

    @property
    def first_failure(self) -> str | None:
        """The name of the first stage that failed."""
        return next((stage.name for stage in self.stages if not stage.passed), None)


def verify(
    stages: Sequence[Stage],
    images: ImageSet,
    *,
    thresholds: Mapping[str, Thresholds] = THRESHOLDS,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Run every stage over `images`; `progress` is called with the images done and their number."""
    _check(stages, thresholds)
    tallies = {stage.name: Tally(stage.name) for stage in stages}
    done = 0
    for batch, labels in images.batches(max(LOADED_AT_ONCE, *(stage.batch_size for stage in stages))):
        logits: dict[str, np.ndarray] = {}
        for stage in stages:
            logits[stage.name] = _logits(stage, batch)
            tallies[stage.name].add(logits[stage.name], labels, logits.get(stage.compared_with or ""))
        done += len(batch)
        if progress is not None:
            progress(done, len(images))
    if done == 0:
        raise InputError("There are no images to verify with; give a set that holds some.")
    names = images.names()
    return VerifyReport(
        stages=[
            _report(
                stage,
                tallies[stage.name],
                thresholds[stage.kind],
                None if stage.compared_with is None else tallies[stage.compared_with],
                names,
            )
            for stage in stages
        ]
    )


def _check(stages: Sequence[Stage], thresholds: Mapping[str, Thresholds]) -> None:
    if not stages:
        raise InputError("There is no stage to verify; give at least one.")
    earlier: list[str] = []
    for stage in stages:
        if stage.name in earlier:
            raise InputError(f"Two stages are called {stage.name}; give each its own name.")
        if stage.batch_size < 1:
            raise InputError(f"Stage {stage.name} has a batch size of {stage.batch_size}; it must be at least 1.")
        if stage.kind not in thresholds:
            hint = near_matches(stage.kind, thresholds)
            raise InputError(f"Stage {stage.name} is of kind {stage.kind!r}; known are {', '.join(thresholds)}.{hint}")
        if stage.compared_with is not None and stage.compared_with not in earlier:
            raise InputError(f"Stage {stage.name} is compared with {stage.compared_with}, which is no earlier stage.")
        earlier.append(stage.name)


def _logits(stage: Stage, images: np.ndarray) -> np.ndarray:
    chunks = [images[i : i + stage.batch_size] for i in range(0, len(images), stage.batch_size)]
    parts = [stage.runner(chunk) for chunk in chunks]
    for chunk, part in zip(chunks, parts, strict=True):
        if part.ndim != 2 or len(part) != len(chunk):
            raise InputError(
                f"Stage {stage.name} gave an output of shape {list(part.shape)} for {len(chunk)} images; "
                "a classifier gives [images, classes]."
            )
    return np.concatenate(parts)


def judged(
    tally: Tally, limits: Thresholds, reference: Tally | None
) -> tuple[dict[str, float | None], list[str], list[str]]:
    """Figures of a stage, a line for each limit that it does not hold against `reference`, and what is to be said."""
    figures: dict[str, float | None] = {**tally.accuracy(), **tally.differences()}
    failures: list[str] = []
    notes: list[str] = []
    if tally.non_finite:
        failures.append(
            f"{len(tally.non_finite)} of {tally.images} images have logits that are not finite, the first is image "
            f"{tally.non_finite[0]}"
        )
    if reference is not None:
        paired = _paired(tally, reference)
        figures |= _drop(paired)
        if tally.classes != reference.classes:
            failures.append(f"gives {tally.classes} classes, {reference.name} gives {reference.classes}")
        elif reference.non_finite:
            failures.append(f"cannot be compared: {reference.name} gave logits that are not finite")
        elif not tally.non_finite:
            limits, notes = _as_far_as_labelled(limits, labelled=paired is not None)
            failures += limits.exceeded(figures)
            notes += _uncertain(paired, limits)
    return figures, failures, notes


def _paired(tally: Tally, reference: Tally) -> PairedAccuracy | None:
    before, now = reference.right(), tally.right()
    return None if before is None or now is None else PairedAccuracy.of(before, now)


def _drop(paired: PairedAccuracy | None) -> dict[str, float | None]:
    if paired is None:
        return {}
    low, high = paired.interval
    return {"drop": paired.drop, "drop_low": low, "drop_high": high, "p_value": paired.p_value}


def _uncertain(paired: PairedAccuracy | None, limits: Thresholds) -> list[str]:
    """That so few images cannot tell on which side of its limit the drop lies, where they cannot."""
    if paired is None or limits.max_drop is None:
        return []
    low, high = paired.interval
    if high <= limits.max_drop or low > limits.max_drop:
        return []
    return [
        f"a drop of {paired.drop:.2f} points ({low:.2f} to {high:.2f} with 95 % confidence): {paired.images} images "
        f"cannot tell whether it is above {limits.max_drop:g}"
    ]


def _report(
    stage: Stage, tally: Tally, limits: Thresholds, before: Tally | None, names: list[str] | None
) -> StageReport:
    figures, failures, notes = judged(tally, limits, before)
    failures += _below_expected(stage, figures, limits)
    return StageReport(
        name=stage.name,
        kind=stage.kind,
        compared_with=stage.compared_with,
        provider=stage.runner.provider,
        batch_size=stage.batch_size,
        images=tally.images,
        worst=tally.worst(names),
        passed=not failures,
        failures=failures,
        notes=notes,
        **cast(dict[str, Any], figures),
    )


def _below_expected(stage: Stage, figures: Mapping[str, float | None], limits: Thresholds) -> list[str]:
    """A line where the model is much less often right than it is known to be: then it is the images that differ.

    All stages see the same arrays, so that a wrong normalization or order of channels makes none depart from another.
    """
    top1, expected = figures.get("top1"), stage.expected_top1
    if expected is None or top1 is None:
        return []
    error = math.hypot(figures["top1_standard_error"] or 0.0, stage.expected_error)
    allowed = TOLERANCE if limits.max_drop is None else limits.max_drop
    if expected - top1 <= allowed + STANDARD_ERRORS * error:
        return []
    return [
        f"top1 is {top1:.2f} on these images, expected is {expected:.2f}. Look at how they are preprocessed "
        "(normalization, order of channels), at their labels, and whether they are of the same kind"
    ]


def _as_far_as_labelled(limits: Thresholds, *, labelled: bool) -> tuple[Thresholds, list[str]]:
    """The thresholds that can be held, and what is to be said where accuracy is not among them."""
    if labelled or limits.max_drop is None:
        return limits, []
    if limits.unlabelled_min_agreement is None:
        return limits.model_copy(update={"max_drop": None}), ["no labels: accuracy was not checked"]
    agreement = limits.unlabelled_min_agreement
    held = limits.model_copy(update={"max_drop": None, "min_agreement": agreement})
    return held, [f"no labels: held against an agreement of {agreement:g} in place of accuracy"]
