"""The chain of proof: the same images through every stage, each compared with one before, the first failure named.

A stage is a runner at a batch size. Its kind picks the thresholds that it must hold against the stage it is compared
with: a low-rank model may answer differently as long as accuracy stays, a runtime must give the same logits, a lower
precision lies between. Images are read once; every stage sees the same arrays.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from pydantic import BaseModel, ConfigDict

from export.images import ImageSet
from export.runners import Runner
from export.tally import Tally
from flora.errors import InputError, near_matches

LOADED_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What a stage must hold against the one it is compared with; None means that it is only reported.

    `max_relative` is the largest difference of two logits over the largest logit, `max_drop` is in points of top-1,
    `min_agreement` is a share. `unlabelled_min_agreement` stands in for `max_drop` where images have no labels.
    """

    min_agreement: float | None = None
    min_cosine: float | None = None
    max_relative: float | None = None
    max_kl: float | None = None
    max_drop: float | None = None
    unlabelled_min_agreement: float | None = None


THRESHOLDS: dict[str, Thresholds] = {
    "lowrank": Thresholds(max_drop=1.0, unlabelled_min_agreement=0.9),
    "fp32": Thresholds(min_agreement=0.99, min_cosine=0.9999, max_relative=1e-3, max_kl=1e-4),
    "fp16": Thresholds(min_agreement=0.98, min_cosine=0.999, max_relative=2e-2, max_kl=5e-3, max_drop=0.5),
    "bf16": Thresholds(min_agreement=0.95, min_cosine=0.99, max_kl=2e-2, max_drop=0.5),
    "int8": Thresholds(min_agreement=0.9, min_cosine=0.98, max_kl=0.1, max_drop=1.0),
    "int8-fp16": Thresholds(min_agreement=0.9, min_cosine=0.98, max_kl=0.1, max_drop=1.0),
    "fp8": Thresholds(min_agreement=0.9, min_cosine=0.98, max_kl=0.1, max_drop=1.0),
}


def thresholds_with_drop(max_drop: float) -> dict[str, Thresholds]:
    """The table, with `max_drop` points of top-1 allowed to low rank and to each lower precision."""
    return {
        kind: limits if limits.max_drop is None else replace(limits, max_drop=max_drop)
        for kind, limits in THRESHOLDS.items()
    }


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One runner at one batch size; `compared_with` names an earlier stage, None is a start of the chain."""

    name: str
    runner: Runner
    batch_size: int
    kind: str
    compared_with: str | None = None


class WorstImage(BaseModel):
    """An image on which a stage strays far from the one it is compared with, whose class is `expected`.

    `kl` is the divergence in nats, `file` a PNG of the image in the bundle.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    name: str
    label: int | None = None
    predicted: int
    expected: int
    kl: float
    file: str | None = None


class StageReport(BaseModel):
    """Figures of one stage. `top1`, `top5` are in percent, their error and `drop` in points, `agreement` a share.

    `cosine` and `kl` are means over images, `max_abs` is the largest difference of two logits. `drop_low` and
    `drop_high` are the paired 95 % interval of `drop`, `p_value` is that of the exact McNemar test.
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
    note: str | None = None


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
    reports: dict[str, StageReport] = {}
    for stage in stages:
        before = None if stage.compared_with is None else tallies[stage.compared_with]
        reports[stage.name] = _report(stage, tallies[stage.name], thresholds[stage.kind], before)
    return VerifyReport(stages=list(reports.values()))


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
) -> tuple[dict[str, float | None], list[str], str | None]:
    """Figures of a stage, a line for each limit that it does not hold against `reference`, and what is to be said."""
    figures: dict[str, float | None] = {**tally.accuracy(), **tally.differences()}
    failures, note = [], None
    if tally.non_finite:
        failures.append(f"{tally.non_finite} of {tally.images} images have logits that are not finite")
    if reference is not None:
        before, now = reference.accuracy().get("top1"), figures.get("top1")
        if before is not None and now is not None:
            figures["drop"] = round(before - now, 6)
        if tally.classes != reference.classes:
            failures.append(f"gives {tally.classes} classes, {reference.name} gives {reference.classes}")
        elif reference.non_finite:
            failures.append(f"cannot be compared: {reference.name} gave logits that are not finite")
        elif not tally.non_finite:
            limits, note = _as_far_as_labelled(limits, labelled="drop" in figures)
            failures += exceeded(figures, limits)
    return figures, failures, note


def _report(stage: Stage, tally: Tally, limits: Thresholds, before: Tally | None) -> StageReport:
    figures, failures, note = judged(tally, limits, before)
    return StageReport(
        name=stage.name,
        kind=stage.kind,
        compared_with=stage.compared_with,
        provider=stage.runner.provider,
        batch_size=stage.batch_size,
        images=tally.images,
        passed=not failures,
        failures=failures,
        note=note,
        **cast(dict[str, Any], figures),
    )


def _as_far_as_labelled(limits: Thresholds, *, labelled: bool) -> tuple[Thresholds, str | None]:
    """The thresholds that can be held, and what is to be said where accuracy is not among them."""
    if labelled or limits.max_drop is None:
        return limits, None
    if limits.unlabelled_min_agreement is None:
        return replace(limits, max_drop=None), "no labels: accuracy was not checked"
    agreement = limits.unlabelled_min_agreement
    held = replace(limits, max_drop=None, min_agreement=agreement)
    return held, f"no labels: held against an agreement of {agreement:g} in place of accuracy"


def exceeded(figures: Mapping[str, float | None], limits: Thresholds) -> list[str]:
    """One line for each threshold that the figures do not hold."""
    bounds = (
        ("agreement", limits.min_agreement, "below"),
        ("cosine", limits.min_cosine, "below"),
        ("max_relative", limits.max_relative, "above"),
        ("kl", limits.max_kl, "above"),
        ("drop", limits.max_drop, "above"),
    )
    lines = []
    for name, limit, side in bounds:
        figure = figures.get(name)
        if limit is None or figure is None:
            continue
        if figure < limit if side == "below" else figure > limit:
            lines.append(f"{name} is {figure:.6g}, {side} {limit:g}")
    return lines
