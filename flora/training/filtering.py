"""Scoring the candidates of one block, with all other blocks at full rank.

A candidate's error is the mean Kullback-Leibler divergence of the model's probabilities from the dense model's. What
enters the block is the same for all its candidates: it is computed once, and a candidate costs the block and what lies
behind it. Not every candidate runs. Each layer's choices are tried alone first, and what they add to the error at full
rank adds up to a prediction. Of each cost bin some candidates of the predicted better part are run; the predictions
for the others are scaled by what those have shown.
"""

from collections.abc import Iterable
from statistics import median

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from flora.lowrank.replay import Replay
from flora.lowrank.supernet import active_ranks
from flora.ranks.cost import ModelCost, Rank
from flora.ranks.filtering import BINS, block_macs, cost_bins, kept_candidates, kept_count
from flora.ranks.space import SearchSpace, block_name
from flora.training.selection import SelectionImages, divergences, log_probabilities

# Candidates to run are taken from so many times the share to keep.
BETTER_PART = 2.0
RUNS_PER_BIN = 8


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
    with active_ranks(supernet, full):
        supernet.eval()
        blocks = [block_name(layers[0]) for layers in space.blocks]
        replay = Replay(supernet, blocks, lambda: (batch for batch, _ in images.batches()))
        replay.move_to(index)

        def measure(ranks: tuple[Rank, ...]) -> tuple[float, float]:
            with active_ranks(supernet, full | dict(zip(names, ranks, strict=True))), replay.active():
                logs = log_probabilities(supernet, images)
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
        behind = [name for layers in space.blocks[index:] for name in layers] if replay.replays else cost.shapes
        share_of_model = _dense_macs(cost, behind) / _dense_macs(cost, cost.shapes)
        passes = len(measured) * share_of_model + 1
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


def _dense_macs(cost: ModelCost, layers: Iterable[str]) -> int:
    return sum(cost.shapes[name].macs("dense") for name in layers)
