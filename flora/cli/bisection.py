"""What `flora verify --bisect` prints: one row for each ONNX file, and what to do about it."""

from typing import TYPE_CHECKING

from flora.cli.output import print_table

if TYPE_CHECKING:
    from export.departures import Departure
    from flora.pipeline.bisect import BundleBisection, FileBisection

# No decibels at all, and more than any error leaves: what stands for no number and for no error.
EXACT = 200.0


def print_bisection(found: "BundleBisection") -> None:
    """The first layer that departs in each file, and beneath what is to be said of it."""
    print_table(
        ["file", "against", "layer", "operator, node", "how", "own", "before", "after", "logits"],
        [_row(one) for one in found.files],
        title=(
            f"First layer that departs, on {found.images} images. Signal to noise, own: of the layer given right "
            "inputs; before, after: in the whole file"
        ),
    )
    for one in found.files:
        label = f"{one.path}{' (altered)' if one.is_altered else ''}"
        if one.first is not None:
            print(f"{label}: {explained(one.first)}")
        if one.comparison and len(one.comparison.departures) > 1:
            others = ", ".join(other.layer for other in one.comparison.departures[1:])
            print(f"{label}: by themselves depart as well: {others}.")
        if one.note:
            print(f"{label}: {one.note}.")
        if one.advice:
            print(f"{label}: {one.advice}")


def explained(first: "Departure") -> str:
    """What was seen of a layer, in a sentence."""
    own = f"signal to noise {decibels(first.own_db)}"
    at = "" if first.limit_db is None else f", {first.limit_db:g} dB would do"
    if first.kind == "overflow":
        size = "a value between its two factors" if first.largest is None else f"{first.largest:.4g}"
        return f"{first.layer} reaches {size}, beyond the range of FP16."
    if first.kind == "not finite":
        return f"{first.layer} gives what is no number."
    if first.kind == "scale":
        return (
            f"{first.layer} quantizes {first.tensor} with a scale {first.steps_ratio:.1f} times as large as these "
            "images need."
        )
    if first.kind == "weights":
        return f"the weights of {first.layer} are not those of the other file ({own}{at})."
    return f"{first.layer} computes something else ({own}{at})."


def decibels(value: float | None) -> str:
    if value is None:
        return "-"
    return "no number" if value <= -EXACT else "exact" if value >= EXACT else f"{value:.1f} dB"


def _row(one: "FileBisection") -> list[str]:
    first = one.first
    name = f"{one.path}{' (altered)' if one.is_altered else ''}"
    if one.comparison is None:
        return [name, "-", "not compared", "-", "-", "-", "-", "-", "-"]
    logits = decibels(one.comparison.logits_db)
    if first is None:
        return [name, one.against or "-", "none", "-", "-", "-", "-", "-", logits]
    return [
        name,
        one.against or "-",
        first.layer,
        f"{first.operator}, {first.node}",
        first.kind,
        decibels(first.own_db),
        decibels(first.entering_db),
        decibels(first.leaving_db),
        logits,
    ]
