"""Figures, on pages that need no network: ranks by layer, score against MACs, error by layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go
from plotly.io import to_html

from calibrate.sensitivity import LayerError
from flora.ranks.config import RankConfig
from flora.ranks.cost import ModelCost, Rank
from flora.ranks.evolution import SearchState, pareto


def write_figures(
    path: Path,
    configs: Mapping[str, RankConfig],
    states: Sequence[SearchState],
    cost: ModelCost,
    *,
    fitness: str,
) -> None:
    """Write one HTML page with the ranks found for each budget, and everything that was evaluated on all images."""
    parts = [
        to_html(_ranks_by_layer(configs, cost), full_html=False, include_plotlyjs=True),
        to_html(_scores_by_macs(states, cost, fitness), full_html=False, include_plotlyjs=False),
    ]
    _write_page(path, "flora search", parts)


def write_sensitivity(path: Path, layers: Sequence[LayerError]) -> None:
    """Write one HTML page with the error of each layer alone in low precision."""
    worst_last = layers[::-1]
    bars = go.Bar(x=[error.sqnr_db for error in worst_last], y=[error.layer for error in worst_last], orientation="h")
    layout = {
        "title": "Each layer alone in INT8: the lower, the more sensitive",
        "xaxis": {"title": "signal to quantization noise of the logits, dB"},
        "yaxis": {"automargin": True},
        "height": 200 + 18 * len(layers),
    }
    _write_page(path, "flora sensitivity", [to_html(go.Figure(bars, layout), full_html=False, include_plotlyjs=True)])


def _write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<title>{title}</title>'
    path.write_text(f"{head}\n</head><body>\n{''.join(parts)}\n</body></html>\n", encoding="utf-8")


def _ranks_by_layer(configs: Mapping[str, RankConfig], cost: ModelCost) -> go.Figure:
    names = [layer.name for layer in cost.layers]

    def share(name: str, rank: Rank) -> float:
        return 1.0 if rank == "dense" else rank / cost.shapes[name].full_rank

    heat = go.Heatmap(
        x=names,
        y=list(configs),
        z=[[share(name, config.ranks[name]) for name in names] for config in configs.values()],
        text=[[str(config.ranks[name]) for name in names] for config in configs.values()],
        texttemplate="%{text}",
        zmin=0,
        zmax=1,
        colorscale="Viridis",
        colorbar={"title": "share of the full rank"},
    )
    return go.Figure(heat, layout={"title": "Ranks by layer", "xaxis": {"tickangle": -90, "automargin": True}})


def _scores_by_macs(states: Sequence[SearchState], cost: ModelCost, fitness: str) -> go.Figure:
    figure = go.Figure(
        layout={
            "title": "Score on the selection images against MACs",
            "xaxis": {"title": "MACs, share of dense", "tickformat": ".0%"},
            "yaxis": {"title": f"fitness: {fitness}"},
        }
    )
    for state in states:
        complete = [one for one in state.evaluated if one.images == state.images]
        figure.add_scatter(
            x=[one.macs / cost.dense_macs for one in complete],
            y=[one.score for one in complete],
            mode="markers",
            name=state.budget,
        )
    front = pareto(states, "macs")
    figure.add_scatter(
        x=[one.macs / cost.dense_macs for one in front],
        y=[one.score for one in front],
        mode="lines",
        name="Pareto set",
    )
    return figure
