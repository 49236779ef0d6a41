"""From a supernet and a choice of ranks to a compact model."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from flora.errors import InputError
from flora.lowrank.checkpoint import (
    DENSE_WEIGHTS,
    MODEL_CONFIG,
    LoadedModel,
    LoadedSupernet,
    ModelConfig,
    SupernetConfig,
    content_digest,
    load_model_folder,
    load_supernet,
    save_model,
)
from flora.lowrank.materialize import materialize
from flora.pipeline.job import OnStart
from flora.ranks.budget import LatencyBudget, Limit, macs_budget
from flora.ranks.config import RankConfig
from flora.ranks.cost import Rank
from flora.ranks.uniform import uniform_ranks, uniform_ranks_for_macs
from flora.resume import SETTINGS, Job
from flora.training.processes import is_main, wait


def chosen_ranks(
    supernet: LoadedSupernet,
    *,
    file: Path | None = None,
    ratio: float | None = None,
    macs: str | None = None,
) -> RankConfig:
    """The rank config from a file, from one ratio for all layers, or from a MACs budget for uniform ranks."""
    if sum(choice is not None for choice in (file, ratio, macs)) != 1:
        raise InputError("Give the ranks in one way: --ranks FILE, --uniform RATIO or --uniform-macs BUDGET.")
    cost = supernet.config.cost
    if file is not None:
        config = RankConfig.load(file)
        config.check(model=supernet.config.model, shapes=cost.shapes)
        return config
    if macs is not None:
        ranks = uniform_ranks_for_macs(cost, macs_budget(macs, cost))
        return _config(supernet, ranks, origin="uniform ratio for a MACs budget", budget=f"macs={macs}")
    return _config(supernet, uniform_ranks(cost, ratio or 0), origin=f"uniform ratio {ratio:g}")


def _config(supernet: LoadedSupernet, ranks: dict[str, Rank], *, origin: str, budget: str | None = None) -> RankConfig:
    cost = supernet.config.cost
    return RankConfig(
        model=supernet.config.model,
        ranks=ranks,
        budget=budget,
        macs=cost.macs(ranks),
        params=cost.params(ranks),
        origin=origin,
    )


def config_within(
    supernet: SupernetConfig, ranks: dict[str, Rank], limit: Limit, *, origin: str, **found: Any
) -> RankConfig:
    """What was chosen within `limit`, with its cost and, by a latency table, its time and its pivoted layers."""
    latency, cost = limit.latency if isinstance(limit, LatencyBudget) else None, supernet.cost
    pivoted = latency.pivoted(ranks) if latency else ()
    return RankConfig(
        model=supernet.model,
        ranks=ranks,
        pivoted=pivoted,
        budget=limit.text,
        macs=cost.macs(ranks, pivoted),
        params=cost.params(ranks, pivoted),
        latency_ms=latency.ms(ranks) if latency else None,
        origin=origin,
        **found,
    )


def compact_from_supernet(supernet: LoadedSupernet, ranks: RankConfig) -> LoadedModel:
    """Materialize `supernet` at `ranks`; the result remembers the dense model it is to be verified against."""
    image_sets = dict(supernet.config.image_sets)
    if ranks.selection:
        image_sets["selection"] = ranks.selection.joined(image_sets.get("selection"))
    config = ModelConfig(
        model=supernet.config.model,
        args=supernet.config.args,
        preprocessing=supernet.config.preprocessing,
        class_names=supernet.config.class_names,
        ranks=ranks.ranks,
        pivoted=ranks.pivoted,
        reference=supernet.reference,
        image_sets=image_sets,
        training=supernet.config.training,
    )
    return LoadedModel(module=materialize(supernet.module, ranks.ranks, ranks.pivoted), config=config)


def materialize_job(source: Path, ranks: RankConfig, out: Path, *, on_start: OnStart) -> None:
    """Write the model folder `out`: the supernet in folder `source` at `ranks`. Where it is there, nothing is done.

    Where only `source` has moved, the same model is written with the place where its dense one lies now.
    """
    chosen = hashlib.sha256(ranks.model_dump_json().encode()).hexdigest()
    job = Job(settings={"source": content_digest(source), "ranks": chosen})
    done = job.is_in(out)
    on_start(done)
    if is_main() and not (done and _knows_dense_of(source, out)):
        cut = compact_from_supernet(load_supernet(source), ranks)
        save_model(out, cut.module, cut.config, ranks=ranks, extra={SETTINGS: job})
    wait()


def with_reference_of(compact: Path, later: Path) -> LoadedModel:
    """The model in folder `later`, made from `compact`, which knows where the dense one lies now if all has moved."""
    model = load_model_folder(later)
    reference = ModelConfig.load(compact / MODEL_CONFIG).reference
    return replace(model, config=model.config.model_copy(update={"reference": reference}))


def _knows_dense_of(source: Path, out: Path) -> bool:
    reference = ModelConfig.load(out / MODEL_CONFIG).reference
    return reference is not None and reference.path == str((source / DENSE_WEIGHTS).absolute())
