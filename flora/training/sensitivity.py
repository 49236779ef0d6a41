"""Probing a supernet: each layer is cut alone, and the model's divergence from the dense one is measured."""

from collections.abc import Callable, Mapping

from torch import nn

from flora.lowrank.replay import Replay
from flora.lowrank.supernet import active_ranks
from flora.ranks.cost import ModelCost
from flora.ranks.sensitivity import LayerSensitivity, probe_rank
from flora.ranks.space import block_name, blocks_of
from flora.training.processes import processes, spread
from flora.training.selection import SelectionImages, divergences, log_probabilities

# Passes over the selection images that all probes together may take, the dense model's own among them.
MOST_PASSES = 60


def probe_layers(
    supernet: nn.Module,
    dense: nn.Module,
    cost: ModelCost,
    images: SelectionImages,
    *,
    known: Mapping[str, LayerSensitivity],
    on_layers: Callable[[dict[str, LayerSensitivity]], None] = lambda probes: None,
) -> dict[str, LayerSensitivity]:
    """The probe of every layer, those in `known` as they are; `on_layers` gets all after each layer or round of them.

    Layers are spread over the processes. What enters a layer's block is computed once for all its layers. In a model of
    so many layers that the passes do not suffice, each probe sees the first part of the images.
    """
    count = min(len(images), max(1, len(images) * (MOST_PASSES - 1) // len(cost.layers)))
    wanted = log_probabilities(dense, images, 0, count)
    full = {layer.name: layer.full_rank for layer in cost.layers}
    shapes = cost.shapes
    blocks = blocks_of(shapes)
    block_of = {name: place for place, names in enumerate(blocks) for name in names}
    supernet.eval()
    replay = Replay(
        supernet,
        [block_name(names[0]) for names in blocks],
        lambda: (batch for batch, _ in images.batches(0, count)),
        stops=True,
    )

    def probe(name: str) -> LayerSensitivity:
        rank = probe_rank(shapes[name])
        with active_ranks(supernet, full):
            replay.move_to(block_of[name])
        with active_ranks(supernet, full | {name: rank}), replay.active():
            found = log_probabilities(supernet, images, 0, count)
        return LayerSensitivity(rank=rank, divergence=max(0.0, divergences(wanted, found).mean().item()))

    probes = dict(known)
    waiting = [name for name in shapes if name not in probes]
    together = processes().num_processes
    for start in range(0, len(waiting), together):
        group = waiting[start : start + together]
        probes.update(zip(group, spread(group, probe), strict=True))
        on_layers(probes)
    return {name: probes[name] for name in shapes}
