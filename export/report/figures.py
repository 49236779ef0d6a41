"""The plots of a report, as plotly's JSON: latency, and where MACs and time go.

Colours are names of CSS variables, which the page puts in place for light, dark and print. What a colour says, a shape
or a pattern says as well.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from export.benchmark import LatencyStats
from export.bundle import PartCost
from export.parts import in_order

INK, QUIET, LINE, PAPER = "var(--ink)", "var(--quiet)", "var(--line)", "var(--paper)"
DENSE, CANDIDATE, FAILED = "var(--dense)", "var(--accent)", "var(--fail)"


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
    layout = layout_of(x="milliseconds a batch", y="")
    layout["xaxis"] |= {"rangemode": "tozero"}
    layout["yaxis"] |= {"showgrid": False}
    return json_of([dots], layout, height=90 + 34 * len(names))


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
    layout = layout_of(x=axis, y="")
    layout["xaxis"] |= {"rangemode": "tozero", "nticks": 5, "tickformat": ".0%" if percent else "~s"}
    layout["yaxis"] |= {"showgrid": False}
    layout |= {"barmode": "group", "bargap": 0.35, "bargroupgap": 0.08, "showlegend": len(models) > 1}
    # Bars of a group stand from below, names in the legend from above.
    return json_of(bars[::-1], layout, height=110 + 38 * len(parts))


def time_in_dense(parts: Mapping[str, PartCost], ratio: float) -> dict[str, float]:
    """The time of each part as a share of the dense model's time, of which the whole takes `ratio`."""
    return {part: ratio * cost.time_share for part, cost in parts.items() if cost.time_share is not None}


def layout_of(*, x: str, y: str) -> dict[str, Any]:
    """What all plots share; `x` and `y` are the titles of the axes."""
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


def json_of(traces: Sequence[Any], layout: dict[str, Any], *, height: int) -> dict[str, Any]:
    """The figure as JSON values, so many pixels high."""
    figure = json.loads(go.Figure(list(traces), layout | {"height": height}).to_json())
    del figure["layout"]["template"]  # plotly's own, which is larger than the rest
    return figure
