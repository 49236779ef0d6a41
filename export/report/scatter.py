"""The plot of accuracy against cost: a point for each model, labelled where it stands, and the front of them all."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go

from export.report.figures import CANDIDATE, DENSE, FAILED, INK, LINE, QUIET, json_of, layout_of

SYMBOLS = {"yardstick": "square", "candidate": "circle", "failed": "x"}
STANDARD_ERRORS = 1.96
# Of the largest cost: where the axis ends, and how wide a label is.
ROOM_FOR_LABELS, ROOM_BESIDE = 1.45, 0.45


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model in a plot of accuracy against cost; `role` picks colour and shape, `error` is a standard error."""

    label: str
    role: str
    accuracy: float
    error: float | None
    cost: float


def accuracy_against(points: Sequence[Point], *, cost: str, accuracy: str) -> dict[str, Any]:
    """Accuracy over one cost, points that nothing beats joined by steps."""
    front, highest = front_of(points), max((point.cost for point in points), default=1.0)
    form = "~s" if highest >= 1000 else "~g"
    traces: list[Any] = [
        go.Scatter(
            x=[point.cost for point in front],
            y=[point.accuracy for point in front],
            mode="lines",
            line={"color": LINE, "width": 1.5, "shape": "hv"},
            hoverinfo="skip",
        )
    ]
    for point, position in zip(points, _positions(points), strict=True):
        traces.append(
            go.Scatter(
                x=[point.cost],
                y=[point.accuracy],
                name=point.label,
                mode="markers+text",
                text=[escape(point.label)],
                textposition=position,
                textfont={"color": INK, "size": 12},
                marker={"color": _colour(point.role), "size": 11, "symbol": SYMBOLS[point.role]},
                error_y={"array": [STANDARD_ERRORS * (point.error or 0.0)], "color": QUIET, "thickness": 1, "width": 4},
                hovertemplate=f"{escape(point.label)}<br>%{{y:.2f}} % at %{{x:.3{form}}}<extra></extra>",
                cliponaxis=False,
            )
        )
    layout = layout_of(x=cost, y=accuracy)
    layout["xaxis"] |= {"range": [0, ROOM_FOR_LABELS * highest], "tickformat": form, "nticks": 5}
    return json_of(traces, layout, height=320)


def front_of(points: Sequence[Point]) -> list[Point]:
    """The points that passed and that no other one beats in accuracy and cost, in the order of their cost."""
    passed = sorted((point for point in points if point.role != "failed"), key=lambda one: (one.cost, -one.accuracy))
    front: list[Point] = []
    for point in passed:
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def _colour(role: str) -> str:
    return {"yardstick": DENSE, "failed": FAILED}.get(role, CANDIDATE)


def _positions(points: Sequence[Point]) -> list[str]:
    """Labels to the right of their points; of points that are near each other to the left, or above and below."""
    width, height = (max(values, default=0.0) or 1.0 for values in ([p.cost for p in points], _heights(points)))
    positions: dict[int, str] = {}
    for place in sorted(range(len(points)), key=lambda one: points[one].cost):
        here = points[place]
        near = [
            other
            for other, point in enumerate(points)
            if other != place
            and abs(point.cost - here.cost) < ROOM_BESIDE * width
            and abs(point.accuracy - here.accuracy) < 0.08 * height
        ]
        is_first = bool(near) and not any(other in positions for other in near)
        aside = ["top right", "bottom right"]
        if any(points[other].accuracy > here.accuracy for other in near):
            aside.reverse()
        free = aside if is_first else ["middle right", *aside]
        if is_first and here.cost > ROOM_BESIDE * width:
            free = ["middle left", *aside]
        taken = {positions.get(other) for other in near}
        positions[place] = next((one for one in free if one not in taken), free[-1])
    return [positions[place] for place in range(len(points))]


def _heights(points: Sequence[Point]) -> list[float]:
    """How far up the error bars of the points reach from the lowest end of all."""
    ends = [(point.accuracy, STANDARD_ERRORS * (point.error or 0.0)) for point in points]
    low = min((accuracy - error for accuracy, error in ends), default=0.0)
    return [accuracy + error - low for accuracy, error in ends]
