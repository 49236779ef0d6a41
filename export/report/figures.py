"""The plots of a report, as plotly's JSON: accuracy against cost, latency, where MACs and time go.

Colours are names of CSS variables, which the page puts in place for light, dark and print. What a colour says, a shape
or a pattern says as well.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go

from export.benchmark import LatencyStats
from export.bundle import PartCost
from export.parts import in_order

INK, QUIET, LINE, PAPER = "var(--ink)", "var(--quiet)", "var(--line)", "var(--paper)"
DENSE, CANDIDATE, FAILED = "var(--dense)", "var(--accent)", "var(--fail)"
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
    layout = _layout(x=cost, y=accuracy)
    layout["xaxis"] |= {"range": [0, ROOM_FOR_LABELS * highest], "tickformat": form, "nticks": 5}
    return _json(traces, layout, height=320)


def front_of(points: Sequence[Point]) -> list[Point]:
    """The points that passed and that no other one beats in accuracy and cost, in the order of their cost."""
    passed = sorted((point for point in points if point.role != "failed"), key=lambda one: (one.cost, -one.accuracy))
    front: list[Point] = []
    for point in passed:
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def latency_plot(latency: Mapping[str, LatencyStats]) -> dict[str, Any]:
    """Medians, and how far the 90th percentile lies above."""
    names, stats = list(latency)[::-1], list(latency.values())[::-1]
    are_dense = [name.startswith("dense") for name in names]
    dots = go.Scatter(
        x=[one.median_ms for one in stats],
        y=[escape(name).replace(", ", "<br>", 1) for name in names],
        mode="markers",
        marker={
            "color": [DENSE if dense else CANDIDATE for dense in are_dense],
            "symbol": ["square" if dense else "circle" for dense in are_dense],
            "size": 11,
        },
        error_x={
            "array": [(one.p90_ms or one.median_ms) - one.median_ms for one in stats],
            "arrayminus": [0.0] * len(stats),
            "color": QUIET,
            "thickness": 1.5,
            "width": 5,
        },
        hovertemplate="%{y}<br>median %{x:.3g} ms<extra></extra>",
    )
    layout = _layout(x="milliseconds a batch", y="")
    layout["xaxis"] |= {"rangemode": "tozero"}
    layout["yaxis"] |= {"showgrid": False}
    return _json([dots], layout, height=90 + 34 * len(names))


def parts_plot(
    models: Mapping[str, Mapping[str, float]], *, axis: str, percent: bool, unit: str = "%{x:.3~s}"
) -> dict[str, Any]:
    """A bar for each part and model, the dense model's first and hatched."""
    parts = in_order({part for costs in models.values() for part in costs})[::-1]
    bars = [
        go.Bar(
            y=parts,
            x=[costs.get(part, 0.0) for part in parts],
            name=name,
            orientation="h",
            marker={
                "color": DENSE if place == 0 and len(models) > 1 else CANDIDATE,
                "pattern": {
                    "shape": "/" if place == 0 and len(models) > 1 else "",
                    "fillmode": "overlay",
                    "fgcolor": PAPER,
                    "size": 5,
                    "solidity": 0.25,
                },
            },
            hovertemplate=f"{name}, %{{y}}<br>{unit}<extra></extra>",
        )
        for place, (name, costs) in enumerate(models.items())
    ]
    layout = _layout(x=axis, y="")
    layout["xaxis"] |= {"rangemode": "tozero", "nticks": 5, "tickformat": ".0%" if percent else "~s"}
    layout["yaxis"] |= {"showgrid": False}
    layout |= {"barmode": "group", "bargap": 0.35, "bargroupgap": 0.08, "showlegend": len(models) > 1}
    # Bars of a group stand from below, names in the legend from above.
    return _json(bars[::-1], layout, height=110 + 38 * len(parts))


def time_in_dense(parts: Mapping[str, PartCost], ratio: float) -> dict[str, float]:
    """The time of each part as a share of the dense model's time, of which the whole takes `ratio`."""
    return {part: ratio * cost.time_share for part, cost in parts.items() if cost.time_share is not None}


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


def _layout(*, x: str, y: str) -> dict[str, Any]:
    axis = {
        "gridcolor": LINE,
        "linecolor": LINE,
        "zeroline": False,
        "tickfont": {"color": QUIET, "size": 12},
        "automargin": True,
        "fixedrange": True,
    }
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "color": INK, "size": 13},
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "showlegend": False,
        "legend": {
            "orientation": "h",
            "y": 1.0,
            "yanchor": "bottom",
            "x": 0,
            "font": {"color": INK},
            "itemclick": False,
            "itemdoubleclick": False,
            "traceorder": "reversed",
        },
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": LINE, "font": {"color": INK}},
        "dragmode": False,
        "xaxis": axis | {"title": {"text": x, "font": {"color": QUIET, "size": 12}}},
        "yaxis": axis | {"title": {"text": y, "font": {"color": QUIET, "size": 12}}},
    }


def _json(traces: Sequence[Any], layout: dict[str, Any], *, height: int) -> dict[str, Any]:
    figure = json.loads(go.Figure(list(traces), layout | {"height": height}).to_json())
    del figure["layout"]["template"]  # plotly's own, which is larger than the rest
    return figure
