"""Filtering the candidates of every block of a supernet, block by block, resumable, on one process or many."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter

from flora.artifact import Document, check_replaceable, new_file
from flora.errors import InputError
from flora.lowrank.checkpoint import (
    DENSE_WEIGHTS,
    FILTER_REPORT,
    SUPERNET_CONFIG,
    LoadedSupernet,
    content_digest,
    load_supernet,
    save_supernet,
)
from flora.lowrank.weights import read_weights
from flora.pipeline.images import identity, training_record
from flora.pipeline.job import OnStart, begin
from flora.ranks.filtering import kept_count
from flora.ranks.space import SearchSpace
from flora.resume import SETTINGS, Job, WorkFolder
from flora.training.alone import Alone
from flora.training.augmentation import AugmentedImages
from flora.training.data import TimmImages
from flora.training.filtering import BlockScores, score_block
from flora.training.processes import is_main, processes, spread, wait
from flora.training.selection import SelectionImages, log_probabilities
from flora.training.settings import MAY_CHANGE, TrainingSettings
from flora.training.train import Trainer

Scorer = Literal["training-free", "local"]


class FilterReport(Document):
    """`filter.json` in a filtered supernet: what was measured of each block, and what stayed."""

    kind: Literal["flora filter"] = "flora filter"
    scorer: Scorer
    share: float
    blocks: tuple[BlockScores, ...]


@dataclass(frozen=True, kw_only=True)
class FilterRequest:
    """`data` is what the local scorer trains on (`settings`), `select_data` what candidates are scored on."""

    select_data: str
    share: float = 0.3
    scorer: Scorer = "training-free"
    data: str | None = None
    settings: TrainingSettings | None = None
    device: torch.device | None = None
    workers: int = 0
    restart: bool = False


def filter_space(
    source: Path,
    out: Path,
    request: FilterRequest,
    *,
    on_start: OnStart = lambda done: None,
    on_block: Callable[[BlockScores], None] = lambda scores: None,
) -> tuple[LoadedSupernet, FilterReport]:
    """Write the supernet of folder `source` to `out` with the candidates that stay; stopped, the same call goes on."""
    check_replaceable(out, marker=SUPERNET_CONFIG)
    if Path(out).absolute() == Path(source).absolute():
        raise InputError(f"{out} is what is filtered; give another folder with --out.")
    if {request.data is not None, request.settings is not None} != {request.scorer == "local"}:
        raise InputError("The local scorer trains, so it needs --data IMAGES; the training-free one takes none.")
    kept_count(request.share, 1)
    supernet = load_supernet(source)
    space = supernet.config.space
    for index in range(len(space.blocks)):
        space.block_candidates(index)
    processes(request.device)
    trained_on = training = None
    preprocessing, seen = supernet.config.preprocessing, dict(supernet.config.image_sets)
    source_images = TimmImages(request.select_data, preprocessing, workers=request.workers)
    record = source_images.record()
    if request.data is not None:
        trained_on = TimmImages(request.data, preprocessing)
        training = training_record(request.data, trained_on)
        seen["training"] = training.joined(seen.get("training"))
    for role in ("calibration", "training"):
        if role in seen:
            record.refuse_overlap(seen[role], own_role="selection", other_role=role)
    images = SelectionImages(source_images)
    # What the trainer refuses must not leave a work folder, for the next command has other settings.
    if request.settings is not None:
        _local_trainer(supernet, 0, request, WorkFolder.of(out))
    job = Job(
        settings={
            "source": content_digest(source),
            "selection": identity(source_images, record),
            "share": request.share,
            "scorer": request.scorer,
            "data": identity(trained_on, training) if trained_on and training else None,
            **(request.settings.model_dump() if request.settings else {}),
        },
        may_change=MAY_CHANGE,
    )
    work = begin(job, out, restart=request.restart, on_start=on_start)
    if work is None:
        return _written(out)
    dense_module = supernet.load_dense().module.to(request.device or "cpu")
    supernet.module.to(request.device or "cpu")
    dense = log_probabilities(dense_module, images)
    count = processes().num_processes
    blocks: list[BlockScores] = []
    for start in range(0, len(space.blocks), count):
        group = range(start, min(start + count, len(space.blocks)))
        files = [work.file(f"block-{index}.json") for index in group]
        if all(file.is_file() for file in files):
            found = [_ONE.validate_json(file.read_bytes()) for file in files]
        else:
            found = spread(group, lambda index: _score(supernet, index, images, dense, request, work))
            if is_main():
                for file, scores in zip(files, found, strict=True):
                    with new_file(file) as partial:
                        partial.write_bytes(_ONE.dump_json(scores))
                for index in group:
                    _local_state(work, index).unlink(missing_ok=True)
        for scores in found:
            on_block(scores)
        blocks += found
        wait()
    report = FilterReport(scorer=request.scorer, share=request.share, blocks=tuple(blocks))
    filtered = space.model_copy(update={"candidates": tuple(scores.kept for scores in blocks)})
    config = supernet.config.model_copy(
        update={
            "space": SearchSpace.model_validate(filtered.model_dump()),
            "image_sets": {**seen, "selection": record.joined(seen.get("selection"))},
        }
    )
    if is_main():
        module = load_supernet(source).module
        dense_state = read_weights(Path(source) / DENSE_WEIGHTS)
        save_supernet(out, module, dense_state, config, extra={FILTER_REPORT: report, SETTINGS: job})
        work.remove()
    wait()
    return _written(out)


def _written(out: Path) -> tuple[LoadedSupernet, FilterReport]:
    return load_supernet(out), FilterReport.load(Path(out) / FILTER_REPORT)


_ONE = TypeAdapter(BlockScores)


def _score(
    supernet: LoadedSupernet,
    index: int,
    images: SelectionImages,
    dense: torch.Tensor,
    request: FilterRequest,
    work: WorkFolder,
) -> BlockScores:
    space, cost = supernet.config.space, supernet.config.cost
    module = supernet.module
    if request.scorer == "local":
        module = _local_trainer(supernet, index, request, work).run()
    return score_block(module, space, cost, index, images, dense, share=request.share)


def _local_state(work: WorkFolder, index: int) -> Path:
    """Where the local supernet of a block lies until the block is scored."""
    return work.file(f"local-{index}.pt")


def _local_trainer(supernet: LoadedSupernet, index: int, request: FilterRequest, work: WorkFolder) -> Trainer:
    """Trains a supernet with the candidates of one block, all other blocks at full rank (the paper's filter)."""
    assert request.data is not None
    assert request.settings is not None
    space = supernet.config.space
    local = SearchSpace(
        choices={
            name: choices if name in space.blocks[index] else ("dense",) for name, choices in space.choices.items()
        },
        blocks=space.blocks,
        candidates=tuple(
            space.block_candidates(i) if i == index else (("dense",) * len(block),)
            for i, block in enumerate(space.blocks)
        ),
    )
    images = TimmImages(request.data, supernet.config.preprocessing, workers=request.workers)
    return Trainer(
        load_supernet(supernet.folder).module,
        AugmentedImages(images, request.settings.augmentation, seed=request.settings.seed),
        request.settings,
        accelerator=Alone(request.device or torch.device("cpu"), request.settings.precision),
        state_file=_local_state(work, index),
        space=local,
        cost=supernet.config.cost,
        workers=request.workers,
    )
