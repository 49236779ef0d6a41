"""Scoring the candidates of one block, with all other blocks at full rank.

A candidate's error is the mean Kullback-Leibler divergence of the model's probabilities from the dense model's. What
enters the block is the same for all its candidates: it is computed once, and a candidate costs the block and what lies
behind it. Not every candidate runs. Each layer's choices are tried alone first, and what they add to the error at full
rank adds up to a prediction. Of each cost bin some candidates of the predicted better part are run; the predictions
for the others are scaled by what those have shown.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from flora.lowrank.supernet import active_ranks
from flora.ranks.cost import ModelCost, Rank
from flora.ranks.filtering import BINS, block_macs, cost_bins, kept_candidates, kept_count
from flora.ranks.space import SearchSpace, block_name
from flora.training.selection import SelectionImages, divergences, log_probabilities

# Candidates to run are taken from so many times the share to keep.
BETTER_PART = 2.0
RUNS_PER_BIN = 8
# The most that is kept of what enters a block; with more, every candidate runs the whole model.
REPLAY_BYTES = 8 * 2**30


class BlockScores(BaseModel):
    """What was found of one block's candidates: errors in nats, agreements in percent (None: not run), what stays."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    block: str
    layers: tuple[str, ...]
    candidates: tuple[tuple[Rank, ...], ...]
    macs: tuple[int, ...]
    errors: tuple[float, ...]
    agreements: tuple[float | None, ...]
    kept: tuple[tuple[Rank, ...], ...]
    image_forwards: float


def score_block(
    supernet: nn.Module,
    space: SearchSpace,
    cost: ModelCost,
    index: int,
    images: SelectionImages,
    dense: Tensor,
    *,
    share: float = 0.3,
    bins: int = BINS,
    runs_per_bin: int = RUNS_PER_BIN,
) -> BlockScores:
    """Score the candidates of block `index`; `dense` holds the dense model's log-probabilities [N, classes].

    `image_forwards` counts passes in whole models, by their MACs.
    """
    names = space.blocks[index]
    candidates, macs = space.block_candidates(index), block_macs(space, cost, index)
    full: dict[str, Rank] = dict(space.largest())
    with active_ranks(supernet, full), _Replay(supernet, space, index, images) as replay:

        def measure(ranks: tuple[Rank, ...]) -> tuple[float, float]:
            with active_ranks(supernet, full | dict(zip(names, ranks, strict=True))):
                logs = replay.log_probabilities()
            divergence = divergences(dense, logs).mean().item()
            return max(divergence, 0.0), 100 * (logs.argmax(1) == dense.argmax(1)).float().mean().item()

        largest = tuple(full[name] for name in names)
        measured = {largest: measure(largest)}
        base = measured[largest][0]
        predicted = [base] * len(candidates)
        for place, name in enumerate(names):
            alone: dict[Rank, float] = {}
            for rank in space.choices[name]:
                probe = tuple(rank if other == name else full[other] for other in names)
                measured[probe] = measured.get(probe) or measure(probe)
                alone[rank] = measured[probe][0]
            predicted = [total + alone[c[place]] - base for total, c in zip(predicted, candidates, strict=True)]
        errors = list(predicted)
        for group in cost_bins(macs, bins):
            better = sorted(group, key=lambda place: predicted[place])
            better = better[: kept_count(min(1.0, BETTER_PART * share), len(group))]
            for place in dict.fromkeys(better[i * len(better) // runs_per_bin] for i in range(runs_per_bin)):
                measured[candidates[place]] = measured.get(candidates[place]) or measure(candidates[place])
            run = [place for place in group if candidates[place] in measured]
            scale = median(measured[candidates[p]][0] / predicted[p] if predicted[p] > 0 else 1.0 for p in run)
            for place in group:
                known = measured.get(candidates[place])
                errors[place] = known[0] if known else predicted[place] * scale
        passes = len(measured) * replay.share_of_model(cost) + 1
    return BlockScores(
        block=block_name(names[0]),
        layers=names,
        candidates=candidates,
        macs=tuple(macs),
        errors=tuple(errors),
        agreements=tuple(measured[c][1] if c in measured else None for c in candidates),
        kept=tuple(kept_candidates(candidates, macs, errors, share, bins=bins)),
        image_forwards=passes * len(images),
    )


class _Replay:
    """Inside `with`, the model runs from one block on: earlier blocks pass through, the block reads what was kept.

    That is kept on the CPU, whatever the model's device, up to `REPLAY_BYTES`.
    """

    def __init__(self, supernet: nn.Module, space: SearchSpace, index: int, images: SelectionImages) -> None:
        self._supernet, self._images = supernet, images
        blocks = [block_name(layers[0]) for layers in space.blocks]
        self._skipped = [supernet.get_submodule(name) for name in blocks[:index]]
        self._block = supernet.get_submodule(blocks[index])
        self._behind = [name for layers in space.blocks[index:] for name in layers]
        self._inputs: list[Tensor] = []
        self._applies = True

    def __enter__(self) -> "_Replay":
        with _recorded([*self._skipped, self._block]) as calls, torch.inference_mode():
            device = next(self._supernet.parameters()).device
            self._supernet.eval()
            for batch, _ in self._images.batches():
                for shapes in calls.values():
                    shapes.clear()
                self._supernet(batch.to(device))
                # Only a block that is called once and keeps the shape can be passed through.
                self._applies &= all(len(c) == 1 and c[0][0].shape == c[0][1] for c in calls.values())
                inputs = calls[self._block][0][0]
                self._applies &= inputs.nbytes / len(batch) * len(self._images) <= REPLAY_BYTES
                if not self._applies:
                    self._inputs = []
                    break
                self._inputs.append(inputs.cpu())
        return self

    def __exit__(self, *error: object) -> None:
        self._inputs = []

    def share_of_model(self, cost: ModelCost) -> float:
        """The part of the model's MACs that one candidate costs."""
        if not self._applies:
            return 1.0
        behind = sum(cost.shapes[name].macs("dense") for name in self._behind)
        everything = sum(layer.macs("dense") for layer in cost.layers)
        return behind / everything

    def log_probabilities(self) -> Tensor:
        """Log-probabilities [N, classes] under the active ranks."""
        if not self._applies:
            return log_probabilities(self._supernet, self._images)
        waiting = iter(self._inputs)
        original = self._block.forward
        for block in self._skipped:
            block.forward = lambda x, *args, **kwargs: x
        self._block.forward = lambda x, *args, **kwargs: original(next(waiting).to(x.device), *args, **kwargs)
        try:
            return log_probabilities(self._supernet, self._images)
        finally:
            for block in (*self._skipped, self._block):
                del block.forward


@contextmanager
def _recorded(modules: Sequence[nn.Module]) -> Iterator[Mapping[nn.Module, list[tuple[Tensor, torch.Size]]]]:
    """Inside, each call of `modules` adds its first input and the shape of its output to the module's list."""
    calls: dict[nn.Module, list[tuple[Tensor, torch.Size]]] = {module: [] for module in modules}
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: calls[module].append((inputs[0], output.shape)))
        for module in modules
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
