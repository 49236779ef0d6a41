"""Compensating a compact model without training, and keeping that only where it helps on selection images."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch

from flora.artifact import check_replaceable
from flora.errors import InputError
from flora.imagesets import at_most
from flora.lowrank.checkpoint import (
    MODEL_CONFIG,
    RANK_CONFIG,
    Compensation,
    content_digest,
    load_model_folder,
    load_reference,
    save_model,
)
from flora.lowrank.compensate import compensate
from flora.pipeline.images import identity
from flora.pipeline.job import OnStart
from flora.ranks.config import RankConfig
from flora.resume import SETTINGS, Job
from flora.training.data import TimmImages
from flora.training.processes import is_main, wait
from flora.training.selection import SelectionImages, divergences, log_probabilities

# More images make it no better.
COMPENSATION_IMAGES = 512
BATCH_SIZE = 32


def compensate_job(
    source: Path,
    out: Path,
    *,
    calib_data: str,
    select_data: str,
    device: torch.device,
    workers: int = 0,
    on_start: OnStart = lambda done: None,
    on_layer: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Write the model folder `out`: the compact one in `source`, compensated where that brings it nearer to the dense.

    Nearer is a smaller divergence on `select_data`, which needs no labels. Where `out` is there, nothing is done.
    """
    check_replaceable(out, marker=MODEL_CONFIG)
    compact = load_model_folder(source)
    settings = compact.config.preprocessing
    calibration = TimmImages(at_most(calib_data, COMPENSATION_IMAGES), settings, workers=workers)
    selection = TimmImages(select_data, settings, workers=workers)
    job = Job(
        settings={
            "source": content_digest(source),
            "calibration": identity(calibration, calibration.record()),
            "selection": identity(selection, selection.record()),
        }
    )
    done = job.is_in(out)
    on_start(done)
    if is_main() and not done:
        dense = load_reference(compact.config)
        if dense is None:
            raise InputError(f"The dense model that {source} came from is gone; build and materialize again.")
        plain, teacher = compact.module.to(device), dense.module.to(device)
        model = copy.deepcopy(plain)
        images, kept = SelectionImages(selection), SelectionImages(calibration, batch_size=BATCH_SIZE)
        wanted = log_probabilities(teacher, images)

        def divergence(module: torch.nn.Module) -> float:
            return divergences(wanted, log_probabilities(module, images)).mean().item()

        compensate(
            model, teacher, list(compact.config.ranks), lambda: (b for b, _ in kept.batches()), on_layer=on_layer
        )
        is_factorized = any(rank != "dense" for rank in compact.config.ranks.values())
        before, after = divergence(plain), divergence(model)
        if not math.isfinite(after):
            raise InputError(
                f"Compensating {source} gave a model without finite outputs; give more calibration images or others."
            )
        found = Compensation(images=len(calibration), before=before, after=after)
        save_model(
            out,
            model if found.helps else plain,
            compact.config.model_copy(update={"compensation": found if is_factorized else None}),
            ranks=RankConfig.load(source / RANK_CONFIG),
            extra={SETTINGS: job},
        )
    wait()
