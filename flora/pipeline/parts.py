"""What a bundle says of the inside of its model: the rank and cost of each layer, and where MACs and time go."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from export.bundle import GOLDEN, LayerEntry, PartCost, read_golden
from export.parts import in_order, part_of, time_shares
from export.runtimes import ORT_CPU
from flora.lowrank.checkpoint import LoadedModel, ModelConfig
from flora.lowrank.targets import macs_by_module, trace_cost
from flora.lowrank.weights import create_timm_model
from flora.onnxfiles import layer_named
from flora.pipeline.proof import Exported, Protocol
from flora.ranks.sensitivity import LayerSensitivity


def layer_entries(
    config: ModelConfig,
    dense: LoadedModel | None,
    *,
    not_pivoted: Collection[str],
    probes: Mapping[str, LayerSensitivity],
) -> list[LayerEntry]:
    """Every layer of the factorized model; `not_pivoted` are those that were to be pivoted and could not be."""
    if not config.ranks:
        return []
    module = dense.module if dense else create_timm_model(config.model, config.args)
    cost = trace_cost(module, list(config.ranks), config.preprocessing.input_size)
    entries = []
    for shape in cost.layers:
        rank, probe = config.ranks[shape.name], probes.get(shape.name)
        is_pivoted = shape.name in config.pivoted and shape.name not in not_pivoted
        entries.append(
            LayerEntry(
                name=shape.name,
                in_features=shape.in_features,
                out_features=shape.out_features,
                tokens=shape.tokens,
                rank=rank if shape.is_factored(rank, pivoted=is_pivoted) else "dense",
                is_pivoted=is_pivoted,
                macs=shape.macs(rank, pivoted=is_pivoted),
                dense_macs=shape.macs("dense"),
                sensitivity=probe.divergence if probe else None,
                probe_rank=probe.rank if probe else None,
            )
        )
    return entries


def part_costs(one: Exported, folder: Path, protocol: Protocol) -> dict[str, PartCost]:
    """MACs of each part of a model in FP32 and, where ONNX Runtime runs it on the CPU, its share of the time there.

    The golden images of the bundle in `folder` are run at the usual batch.
    """
    macs = macs_by_part(one)
    shares = {}
    if one.runtime == ORT_CPU:
        images = read_golden(folder / GOLDEN)[0]
        batch = np.resize(images, (protocol.usual, *images.shape[1:]))
        shares = time_shares(folder / one.path, batch, threads=protocol.threads)
    return {
        part: PartCost(macs=macs.get(part, 0), time_share=shares.get(part, 0.0) if shares else None)
        for part in in_order({*macs, *shares})
    }


def macs_by_part(one: Exported) -> dict[str, int]:
    """MACs of one image in each part of the exported model."""
    by_module = macs_by_module(one.module, one.model.config.preprocessing.input_size)
    weights = (name for name, _ in one.module.named_parameters() if name.endswith((".weight", ".pivot")))
    holders = {name.rpartition(".")[0] for name in weights}
    layers = {layer_named(name) for name in holders & set(by_module)}
    macs: Counter[str] = Counter()
    for name, count in by_module.items():
        macs[part_of(name, layers)] += count
    return dict(macs)
