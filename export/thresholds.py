"""What a stage of the chain must hold, by its kind: one table, whose figures a user may override.

A low-rank model may answer differently as long as accuracy stays, a runtime must give the same logits, a lower
precision lies between.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from flora.errors import InputError, near_matches

FORM = "write KIND.NAME=VALUE, such as fp16.min_agreement=0.95"
# Figures of a stage, and the threshold that holds each.
LIMITED = {
    "agreement": "min_agreement",
    "cosine": "min_cosine",
    "max_relative": "max_relative",
    "kl": "max_kl",
    "drop": "max_drop",
}
SHARES = ("min_agreement", "min_cosine", "unlabelled_min_agreement")


class Thresholds(BaseModel):
    """What a stage must hold against the one it is compared with; None means that it is only reported.

    `max_relative` is the largest difference of two logits over the largest logit, `max_kl` in nats, `max_drop` in
    points of top-1, the others are shares. `unlabelled_min_agreement` stands in for `max_drop` where images have no
    labels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_agreement: float | None = None
    min_cosine: float | None = None
    max_relative: float | None = None
    max_kl: float | None = None
    max_drop: float | None = None
    unlabelled_min_agreement: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, limit in self:
            most = 1 if name in SHARES else sys.float_info.max
            if limit is not None and not 0 <= limit <= most:
                raise ValueError(f"{name} is {'from 0 to 1' if name in SHARES else '0 or more'}, got {limit:g}")
        return self

    def exceeded(self, figures: Mapping[str, float | None]) -> list[str]:
        """One line for each threshold that `figures` (agreement, cosine, max_relative, kl, drop) do not hold."""
        lines = []
        for name, threshold in LIMITED.items():
            limit, figure = getattr(self, threshold), figures.get(name)
            if limit is None or figure is None:
                continue
            if figure < limit if is_least(threshold) else figure > limit:
                lines.append(f"{name} is {figure:.6g}, {'below' if is_least(threshold) else 'above'} {limit:g}")
        return lines


THRESHOLDS: dict[str, Thresholds] = {
    "lowrank": Thresholds(max_drop=1.0, unlabelled_min_agreement=0.9),
    "fp32": Thresholds(min_agreement=0.99, min_cosine=0.9999, max_relative=1e-3, max_kl=1e-4),
    "fp16": Thresholds(min_agreement=0.98, min_cosine=0.999, max_relative=2e-2, max_kl=5e-3, max_drop=0.5),
    "bf16": Thresholds(min_agreement=0.95, min_cosine=0.99, max_kl=2e-2, max_drop=0.5),
    "int8": Thresholds(min_agreement=0.9, min_cosine=0.98, max_kl=0.1, max_drop=1.0),
    "int8-fp16": Thresholds(min_agreement=0.9, min_cosine=0.98, max_kl=0.1, max_drop=1.0),
    "fp8": Thresholds(min_agreement=0.9, min_cosine=0.98, max_kl=0.1, max_drop=1.0),
}


def is_least(threshold: str) -> bool:
    """Whether a threshold is the least that is allowed, not the most."""
    return threshold.startswith("min_")


def thresholds_with(
    max_drop: float | None = None,
    overrides: Sequence[str] = (),
    table: Mapping[str, Thresholds] = THRESHOLDS,
) -> dict[str, Thresholds]:
    """The `table` with `max_drop` points of top-1 allowed wherever it limits them, then with `overrides`.

    An override is KIND.NAME=VALUE, or KIND.NAME=none for a figure that is only to be reported; `InputError` for one
    that is neither.
    """
    changed = dict(table)
    if max_drop is not None:
        limited = [kind for kind, limits in table.items() if limits.max_drop is not None]
        overrides = [*(f"{kind}.max_drop={max_drop}" for kind in limited), *overrides]
    for text in overrides:
        kind, name, value = _parsed(text, changed)
        changed[kind] = _changed(changed[kind], name, value, text)
    return changed


def _parsed(text: str, table: Mapping[str, Thresholds]) -> tuple[str, str, float | None]:
    parts = re.fullmatch(r"([\w-]+)\.(\w+)=(\S+)", text.strip())
    if parts is None:
        raise InputError(f"{text!r} is no threshold; {FORM}.")
    kind, name, value = parts.groups()
    for given, known, what in ((kind, table, "kind of stage"), (name, Thresholds.model_fields, "threshold")):
        if given not in known:
            raise InputError(
                f"{text!r}: {given!r} is no {what}; known are {', '.join(known)}.{near_matches(given, known)}"
            )
    if value == "none":
        return kind, name, None
    try:
        return kind, name, float(value)
    except ValueError as error:
        raise InputError(f"{text!r}: {value!r} is no number; {FORM}.") from error


def _changed(limits: Thresholds, name: str, value: float | None, text: str) -> Thresholds:
    try:
        return Thresholds.model_validate(limits.model_dump() | {name: value})
    except ValidationError as error:
        raise InputError(f"{text!r}: {error.errors()[0]['msg'].removeprefix('Value error, ')}; {FORM}.") from error
