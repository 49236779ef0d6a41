"""Training a supernet or fine-tuning a model folder, resumable, on one process or many."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from flora.artifact import Document, check_replaceable
from flora.errors import BackendMissingError, InputError
from flora.imagesets import ImageSetRecord, at_most
from flora.lowrank.checkpoint import (
    DENSE_WEIGHTS,
    FILTER_REPORT,
    MODEL_CONFIG,
    RANK_CONFIG,
    SUPERNET_CONFIG,
    LoadedModel,
    LoadedSupernet,
    TrainingRecord,
    content_digest,
    is_supernet_folder,
    load_model,
    load_model_folder,
    load_reference,
    load_supernet,
    save_model,
    save_supernet,
)
from flora.lowrank.supernet import active_ranks
from flora.lowrank.weights import read_weights, weights_digest
from flora.pipeline.filter import FilterReport
from flora.pipeline.images import MOST_DIGESTS, identity, training_record
from flora.pipeline.job import OnStart, begin, finished
from flora.preprocessing import Preprocessing
from flora.ranks.config import RankConfig
from flora.resume import SETTINGS, Job, WorkFolder
from flora.training.augmentation import AugmentedImages
from flora.training.data import TimmImages
from flora.training.evaluate import check_labels, evaluate
from flora.training.processes import accelerator, is_main, processes, spread, wait
from flora.training.selection import check_labelled
from flora.training.settings import MAY_CHANGE, TrainingSettings
from flora.training.teacher import TeacherCache, TeacherFacts
from flora.training.train import Teacher, Trainer

STATE = "state.pt"
CPU = torch.device("cpu")
EVERY_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What to train on and how.

    `teacher` is "dense" (the dense model of the folder), "none", a model folder or a timm name with
    `teacher_checkpoint`. With `teacher_cache` its answers are kept there. `select_data` are images on which the
    smallest and the largest subnet are evaluated after each epoch.
    """

    data: str
    settings: TrainingSettings
    teacher: str = "dense"
    teacher_checkpoint: Path | None = None
    teacher_cache: Path | None = None
    top_k: int = 100
    select_data: str | None = None
    tensorboard: Path | None = None
    device: torch.device = CPU
    workers: int = 0
    restart: bool = False


class OnStep(Protocol):
    def __call__(self, step: int, steps: int, loss: float) -> None: ...


def train(
    source: Path,
    out: Path,
    request: TrainRequest,
    *,
    on_start: OnStart = lambda done: None,
    on_step: OnStep = lambda step, steps, loss: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda figures: None,
) -> LoadedSupernet | LoadedModel:
    """Train the supernet or model in folder `source` and write the folder `out`; stopped, the same call goes on."""
    is_supernet = is_supernet_folder(source)
    check_replaceable(out, marker=SUPERNET_CONFIG if is_supernet else MODEL_CONFIG)
    if Path(out).absolute() == Path(source).absolute():
        raise InputError(f"{out} is what is trained; give another folder with --out.")
    processes(request.device)
    loaded: LoadedSupernet | LoadedModel = load_supernet(source) if is_supernet else load_model_folder(source)
    preprocessing = loaded.config.preprocessing
    images = TimmImages(request.data, preprocessing, workers=request.workers)
    record = training_record(request.data, images)
    selection = None
    if request.select_data:
        selection = TimmImages(request.select_data, preprocessing, workers=request.workers)
    chosen_by = selection.record() if selection else None
    if chosen_by is not None:
        record.refuse_overlap(chosen_by, own_role="training", other_role="selection")
    if selection is not None and not selection.is_streamed:
        why = "by which the model is judged after each epoch; make one folder for each class"
        check_labelled(selection, loaded.module, why)
    teacher = _load_teacher(loaded, request)
    job = Job(
        settings={
            "source": content_digest(source),
            "images": identity(images, record),
            "teacher": weights_digest(teacher.module) if teacher else None,
            "top_k": request.top_k if request.teacher_cache else None,
            "selection": identity(selection, chosen_by) if selection and chosen_by else None,
            **request.settings.model_dump(),
        },
        may_change=MAY_CHANGE,
    )
    # What the trainer refuses must not leave a work folder, for the next command has other settings.
    trainer = None
    if not finished(job, out, restart=request.restart):
        trainer = _trainer(loaded, teacher, images, request, WorkFolder.of(out).file(STATE))
    work = begin(job, out, restart=request.restart, on_start=on_start)
    if work is None or trainer is None:
        return _written(out)
    board = _board(request.tensorboard)
    steps = trainer.steps_per_epoch * request.settings.epochs

    def note_step(step: int, loss: float) -> None:
        on_step(step=step, steps=steps, loss=loss)
        if board and step % EVERY_STEPS == 0:
            board.add_scalar("train/loss", loss, step)
            board.add_scalar("train/learning_rate", trainer.optimizer.param_groups[0]["lr"], step)

    def judge(module: nn.Module, images: TimmImages) -> dict[str, Any]:
        figures = _accuracies(loaded, module, images)
        if board:
            for name, value in figures.items():
                board.add_scalar(f"selection/{name}", value, trainer.progress.step)
        return figures

    at_epoch_end = partial(judge, images=selection) if selection is not None else None
    module = trainer.run(on_step=note_step, at_epoch_end=at_epoch_end, on_epoch=on_epoch).cpu()
    if board:
        board.close()
    trained = TrainingRecord(
        images=request.data,
        teacher=None if request.teacher == "none" else request.teacher,
        settings=request.settings.model_dump(mode="json"),
        history=tuple(trainer.progress.history),
        changes=tuple(trainer.progress.changes),
    )
    if is_main():
        _save(loaded, module, Path(source), out, record, trained, job)
        work.remove()
    wait()
    return _written(out)


def check_training(student: LoadedModel, request: TrainRequest) -> None:
    """Raise `InputError` where `train` would refuse to train supernets and models that come from `student`."""
    student = replace(student, module=deepcopy(student.module))
    images = TimmImages(request.data, student.config.preprocessing)
    _trainer(student, _load_teacher(student, request), images, request, Path(STATE))
    part = TimmImages(at_most(request.data, MOST_DIGESTS), student.config.preprocessing)
    check_labels(part.labels(), cast(int, student.module.num_classes), "The training images have")


def _trainer(
    student: LoadedSupernet | LoadedModel,
    teacher: LoadedModel | None,
    images: TimmImages,
    request: TrainRequest,
    state_file: Path,
) -> Trainer:
    return Trainer(
        student.module,
        AugmentedImages(images, request.settings.augmentation, seed=request.settings.seed),
        request.settings,
        accelerator=accelerator(request.device, request.settings.precision),
        state_file=state_file,
        space=student.config.space if isinstance(student, LoadedSupernet) else None,
        cost=student.config.cost if isinstance(student, LoadedSupernet) else None,
        teacher=_teacher(teacher, images, request, student) if teacher else None,
        workers=request.workers,
    )


def _written(out: Path) -> LoadedSupernet | LoadedModel:
    return load_supernet(out) if is_supernet_folder(out) else load_model_folder(out)


def _load_teacher(loaded: LoadedSupernet | LoadedModel, request: TrainRequest) -> LoadedModel | None:
    if request.teacher == "none":
        if request.teacher_cache or request.teacher_checkpoint:
            raise InputError("--teacher none learns from the labels alone; leave out the other teacher options.")
        return None
    if request.teacher == "dense":
        if request.teacher_checkpoint:
            raise InputError("--teacher-checkpoint belongs to a timm name: --teacher NAME.")
        teacher = loaded.load_dense() if isinstance(loaded, LoadedSupernet) else _dense_of(loaded)
    else:
        teacher = load_model(
            request.teacher,
            args={"num_classes": loaded.module.num_classes} if request.teacher_checkpoint else None,
            checkpoint=request.teacher_checkpoint,
        )
    given, wanted = teacher.module.num_classes, loaded.module.num_classes
    if given != wanted:
        raise InputError(
            f"The teacher {request.teacher} has {given} classes, the student {wanted}; "
            "give a teacher that was trained for the same classes."
        )
    if teacher.config.preprocessing.input_size != loaded.config.preprocessing.input_size:
        raise InputError(
            f"The teacher takes images of {teacher.config.preprocessing.input_size}, the student of "
            f"{loaded.config.preprocessing.input_size} (channels, height, width); give one with the same input."
        )
    return teacher


def _dense_of(loaded: LoadedModel) -> LoadedModel:
    if not loaded.config.ranks:
        return replace(loaded, module=deepcopy(loaded.module))
    dense = load_reference(loaded.config)
    if dense is None:
        raise InputError(
            "The dense model that this one came from was not found; name a teacher with --teacher FOLDER, "
            "or learn from the labels alone with --teacher none."
        )
    return dense


def _teacher(teacher: LoadedModel, images: TimmImages, request: TrainRequest, student: LoadedSupernet | LoadedModel):
    # timm's task converts images between the normalizations that the two modules name.
    for loaded in (teacher, student):
        settings: Preprocessing = loaded.config.preprocessing
        module: Any = loaded.module
        module.pretrained_cfg = {**module.pretrained_cfg, "mean": settings.mean, "std": settings.std}
    if request.teacher_cache is None:
        return Teacher(module=teacher.module)
    if teacher.config.preprocessing != student.config.preprocessing:
        raise InputError(
            "A teacher whose answers are kept must see the same images: its normalization is another than the "
            "student's. Leave out --teacher-cache."
        )
    digests = images.digests()
    assert digests is not None
    classes = cast(int, teacher.module.num_classes)
    facts = TeacherFacts(
        teacher_sha256=weights_digest(teacher.module),
        classes=classes,
        top_k=min(request.top_k, classes),
        transform=f"{request.settings.augmentation.model_dump_json()} {student.config.preprocessing.model_dump_json()}",
    )
    if is_main():
        TeacherCache(request.teacher_cache, facts)
    wait()
    return Teacher(
        module=teacher.module.to(request.device),
        cache=TeacherCache(request.teacher_cache, facts),
        image_keys=tuple(int(digest, 16) for digest in digests),
    )


def _accuracies(loaded: LoadedSupernet | LoadedModel, module: nn.Module, images: TimmImages) -> dict[str, float]:
    """Top-1 in percent of the smallest and the largest subnet, or of the model."""
    if isinstance(loaded, LoadedModel):
        return {"top1": round(evaluate(module, images.loader(250)).top1, 3)}
    space = loaded.config.space

    def top1(name: str) -> float:
        with active_ranks(module, getattr(space, name)()):
            return round(evaluate(module, images.loader(250)).top1, 3)

    names = ["smallest", "largest"]
    return {f"top1_{name}": value for name, value in zip(names, spread(names, top1), strict=True)}


def _board(folder: Path | None):
    """TensorBoard's writer in the writing process; None without a folder."""
    if folder is None or not is_main():
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BackendMissingError(f"--tensorboard needs the package tensorboard: {error}") from error
    return SummaryWriter(str(folder))


def _save(
    loaded: LoadedSupernet | LoadedModel,
    module: nn.Module,
    source: Path,
    out: Path,
    record: ImageSetRecord,
    trained: TrainingRecord,
    job: Job,
) -> None:
    config = loaded.config
    update = {
        "image_sets": {**config.image_sets, "training": record.joined(config.image_sets.get("training"))},
        "training": (*config.training, trained),
    }
    if isinstance(loaded, LoadedSupernet):
        dense = read_weights(source / DENSE_WEIGHTS)
        report = source / FILTER_REPORT
        extra: dict[str, Document] = {FILTER_REPORT: FilterReport.load(report)} if report.is_file() else {}
        save_supernet(out, module, dense, loaded.config.model_copy(update=update), extra={**extra, SETTINGS: job})
    else:
        ranks = source / RANK_CONFIG
        save_model(
            out,
            module,
            loaded.config.model_copy(update={**update, "compensation": None}),
            ranks=RankConfig.load(ranks) if ranks.is_file() else None,
            extra={SETTINGS: job},
        )
