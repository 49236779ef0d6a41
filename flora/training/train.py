"""Training: a supernet whose ranks change at every step, or a plain model, with the same loop.

In each step one rank config is drawn and set (the paper's sampling), or with the sandwich rule the largest, the
smallest and some drawn ones; all processes draw the same. The nested factors share what they learn. Loss and
distillation are timm's tasks, processes and precision Accelerate's.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.layers import PatchDropout
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask, DistillationTeacher, LogitDistillationTask
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flora.artifact import new_file
from flora.errors import BadLossError, InputError
from flora.lowrank.supernet import elastic_layers, set_ranks
from flora.ranks.cost import ModelCost, Rank
from flora.ranks.sampling import Sampler, sandwich
from flora.ranks.space import SearchSpace
from flora.training.alone import Alone
from flora.training.augmentation import AugmentedImages, seeded
from flora.training.evaluate import check_labels
from flora.training.segments import RankSegments
from flora.training.settings import MAY_CHANGE, TrainingSettings
from flora.training.teacher import EpochAnswers, TeacherCache


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model to learn from; with a `cache` its answers are kept, and `image_keys` are the training images' keys."""

    module: nn.Module
    cache: TeacherCache | None = None
    image_keys: tuple[int, ...] = ()


@dataclass(kw_only=True)
class Progress:
    """How far a run has come: finished steps, and what it noted at the end of each epoch.

    `loss` is the mean loss of an epoch that is trained, but not in the history yet. Each of `changes` names settings
    (of `MAY_CHANGE`) that were others before, and the last epoch that was trained with these.
    """

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    loss: float | None = None
    changes: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """One training run; `run` goes on from `state_file` when there is one, and returns the trained module.

    With `space` and `cost` the model is a supernet, and each step draws from the space.
    """

    def __init__(
        self,
        model: nn.Module,
        images: AugmentedImages,
        settings: TrainingSettings,
        *,
        accelerator: Accelerator | Alone,
        state_file: Path,
        space: SearchSpace | None = None,
        cost: ModelCost | None = None,
        teacher: Teacher | None = None,
        workers: int = 0,
    ) -> None:
        self.settings, self.images, self.space, self.teacher = settings, images, space, teacher
        self.accelerator, self.state_file, self.workers = accelerator, state_file, workers
        self.progress = Progress()
        self._per_pass = images_per_pass(settings, len(images), accelerator.num_processes)
        self.steps_per_epoch = len(images) // settings.batch_size
        self.model = model.to(accelerator.device)
        self._patch_drop = _drop_patches(model, settings.patch_drop)
        self.sampler = Sampler(space, cost, settings.sampling) if space and cost else None
        self.segments = RankSegments(self.model, space.choices) if space else None
        self.average = ModelEmaV3(model, decay=settings.ema_decay) if settings.ema_decay else None
        optimizer = self._create_optimizer()
        self.schedule = self._create_schedule(optimizer)
        self.wrapped: nn.Module
        self.optimizer: torch.optim.Optimizer
        self.wrapped, self.optimizer = accelerator.prepare(self.model, optimizer)
        self.mixup = self._create_mixup()
        self.task = self._create_task()

    def run(
        self,
        *,
        on_step: Callable[[int, float], None] = lambda step, loss: None,
        at_epoch_end: Callable[[nn.Module], dict[str, Any]] | None = None,
        on_epoch: Callable[[dict[str, Any]], None] = lambda figures: None,
    ) -> nn.Module:
        """Train to the end; `on_step` gets each step and its loss, `at_epoch_end` adds figures to the history.

        What `at_epoch_end` raises costs no epoch, for the state is kept before, too. `on_epoch` gets each new line of
        the history with the seconds that the epoch took.
        """
        self._load_state()
        for epoch in range(len(self.progress.history), self.settings.epochs):
            began = time.monotonic()
            if self.progress.loss is None:
                self.progress.loss = self._train_epoch(epoch, on_step)
                if at_epoch_end:
                    self._save_state()
            figures = at_epoch_end(self.trained()) if at_epoch_end else {}
            self.progress.history.append({"epoch": epoch + 1, "loss": self.progress.loss, **figures})
            self.progress.loss = None
            on_epoch({**self.progress.history[-1], "seconds": time.monotonic() - began})
            self._save_state()
        module = self.trained()
        if self._patch_drop is not None:
            for model in {module, self.model}:
                model.patch_drop = nn.Identity()
        if self.space:
            set_ranks(module, self.space.largest())
        return module.eval()

    def trained(self) -> nn.Module:
        """The moving average of the weights where one is kept, else the weights."""
        return self.average.module if self.average else self.model

    def _train_epoch(self, epoch: int, on_step: Callable[[int, float], None]) -> float:
        """The mean loss of an epoch's steps."""
        self.images.epoch = epoch
        answers = self.teacher.cache.epoch(epoch) if self.teacher and self.teacher.cache else None
        self.model.train()
        losses = []
        for passes in self._batches(epoch):
            loss = self._step(passes, answers)
            if not math.isfinite(loss):
                self._stop_at_bad_loss(loss, epoch)
            losses.append(loss)
            self.progress.step += 1
            on_step(self.progress.step, loss)
        if answers:
            answers.save()
        return round(sum(losses) / len(losses), 5)

    def _step(self, passes: list[tuple[Tensor, ...]], answers: EpochAnswers | None) -> float:
        """One optimizer step over the accumulated `passes`; the mean loss over all processes."""
        step = self.progress.step
        if self.schedule:
            self.schedule.step_update(step)
        # What a model draws while training differs between processes, the ranks do not.
        torch.manual_seed(self.settings.seed * 1_000_003 + step * 1_009 + self.accelerator.process_index)
        configs = self._draw_configs(step)
        self.model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(passes):
            inputs, targets = self._inputs_and_targets(batch, answers)
            for place, ranks in enumerate(configs):
                if ranks is not None:
                    set_ranks(self.model, ranks)
                is_last = number == len(passes) - 1 and place == len(configs) - 1
                with nullcontext() if is_last else self.accelerator.no_sync(self.wrapped):
                    with self.accelerator.autocast():
                        loss = self.task(inputs, targets)["loss"] / (len(passes) * len(configs))
                    self.accelerator.backward(loss)
                total += loss.detach()
        mean = self.accelerator.reduce(total, "mean").item()
        if math.isfinite(mean):
            self._update(configs)
        return mean

    def _update(self, configs: list[dict[str, Rank] | None]) -> None:
        if self.segments:
            layers = elastic_layers(self.model)
            used = dict.fromkeys(layers, 0)
            for ranks in configs:
                for name, layer in layers.items():
                    rank = ranks[name] if ranks else "dense"
                    used[name] = max(used[name], layer.full_rank if rank == "dense" else rank)
            self.segments.take_gradients(used)
        if self.settings.clip_grad:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.accelerator.clip_grad_norm_(parameters, self.settings.clip_grad)
        self.optimizer.step()
        if self.average:
            self.average.update(self.model, step=self.progress.step)

    def _draw_configs(self, step: int) -> list[dict[str, Rank] | None]:
        if self.sampler is None or self.space is None:
            return [None]
        rng = random.Random(f"{self.settings.seed}/{step}")
        if self.settings.sandwich is None:
            return [self.sampler.sample(rng)]
        return list(sandwich(self.space, self.sampler, rng, self.settings.sandwich))

    def _inputs_and_targets(self, batch: tuple[Tensor, ...], answers: EpochAnswers | None) -> tuple[Tensor, Tensor]:
        inputs, labels, indices, seeds = batch
        check_labels(labels, cast(int, self.model.num_classes), "The training images have")
        inputs, labels = inputs.to(self.accelerator.device), labels.to(self.accelerator.device)
        if self.mixup:
            with seeded(int(seeds[0])):
                return self.mixup(inputs, labels)
        if answers is None or self.teacher is None:
            return inputs, labels
        keys = [self.teacher.image_keys[i] for i in indices.tolist()]
        targets, known = answers.find(keys, seeds.tolist())
        if not known.all():
            missing = torch.nonzero(~known).flatten().tolist()
            with torch.no_grad(), self.accelerator.autocast():
                asked = self.teacher.module(inputs[missing]).float().softmax(dim=1)
            targets[missing] = answers.add([keys[i] for i in missing], seeds[missing].tolist(), asked)
        targets = targets.to(inputs.device)
        if weight := self.settings.task_weight:
            hard = nn.functional.one_hot(labels, targets.shape[1]).float()
            hard = hard * (1 - self.settings.label_smoothing) + self.settings.label_smoothing / targets.shape[1]
            targets = weight * hard + (1 - weight) * targets
        return inputs, targets

    def _batches(self, epoch: int) -> Iterator[list[tuple[Tensor, ...]]]:
        """The passes of each step of an epoch: this process's share of every batch."""
        settings, world = self.settings, self.accelerator.num_processes
        order = torch.randperm(
            len(self.images), generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        ).tolist()
        size = settings.batch_size // settings.accumulation
        stop = self.steps_per_epoch * settings.batch_size
        mine = [order[at : at + size][self.accelerator.process_index :: world] for at in range(0, stop, size)]
        loader = iter(
            DataLoader(
                self.images,
                batch_sampler=mine,
                num_workers=self.workers,
                pin_memory=self.accelerator.device.type == "cuda",
            )
        )
        for _ in range(self.steps_per_epoch):
            yield [next(loader) for _ in range(settings.accumulation)]

    def _create_optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        no_decay: set[str] = getattr(self.model, "no_weight_decay", set)()
        groups = param_groups_weight_decay(self.model, settings.weight_decay, no_weight_decay_list=no_decay)
        if self.segments:
            groups = [group | {"params": self.segments.in_place_of(group["params"])} for group in groups]
        try:
            return create_optimizer_v2(
                groups, settings.optimizer, lr=settings.learning_rate, weight_decay=settings.weight_decay
            )
        except (ValueError, AssertionError) as error:
            raise InputError(f"The optimizer {settings.optimizer!r} cannot be used: {error}") from error

    def _create_schedule(self, optimizer: torch.optim.Optimizer) -> Scheduler | None:
        settings = self.settings
        try:
            schedule, _ = create_scheduler_v2(
                optimizer,
                settings.schedule,
                num_epochs=settings.epochs,
                min_lr=settings.min_learning_rate,
                warmup_lr=settings.warmup_learning_rate,
                warmup_epochs=settings.warmup_epochs,  # type: ignore[arg-type]  # timm multiplies it, a half is fine
                step_on_epochs=False,
                updates_per_epoch=self.steps_per_epoch,
            )
        except (ValueError, AssertionError) as error:
            raise InputError(f"The schedule {settings.schedule!r} cannot be used: {error}") from error
        return schedule

    def _create_mixup(self) -> Mixup | None:
        augmentation = self.images.augmentation
        if not augmentation.mixes:
            return None
        if self.teacher and self.teacher.cache:
            raise InputError(
                "Mixup and cutmix make images that no cache holds answers for; leave out --teacher-cache or them."
            )
        if self._per_pass % 2:
            raise InputError(
                f"Mixup and cutmix mix images in pairs, and a process gets {self._per_pass} in one pass; "
                "choose another --batch-size."
            )
        return Mixup(
            mixup_alpha=augmentation.mixup,
            cutmix_alpha=augmentation.cutmix,
            label_smoothing=self.settings.label_smoothing,
            num_classes=self.model.num_classes,
        )

    def _create_task(self) -> nn.Module:
        settings, device = self.settings, self.accelerator.device
        soft = bool(self.mixup)
        criterion = {"soft_targets": soft} | ({} if soft else {"smoothing": settings.label_smoothing})
        if self.teacher is None:
            return ClassificationTask(self.wrapped, criterion_kwargs=criterion, device=device, verbose=False)
        module = self.teacher.module.to(device).eval().requires_grad_(False)
        if self.teacher.cache:
            if settings.temperature != 1:
                raise InputError("Kept answers are probabilities at temperature 1; leave out --temperature.")
            return ClassificationTask(self.wrapped, criterion=SoftTargetCrossEntropy(), device=device, verbose=False)
        return LogitDistillationTask(
            self.wrapped,
            DistillationTeacher(module, device=device),
            criterion_kwargs=criterion,
            task_loss_weight=settings.task_weight,
            temperature=settings.temperature,
            device=device,
            verbose=False,
        )

    def _stop_at_bad_loss(self, loss: float, epoch: int) -> None:
        kept = f"the state after epoch {len(self.progress.history)} is kept in {self.state_file}"
        raise BadLossError(
            f"The loss is {loss} in step {self.progress.step + 1} (epoch {epoch + 1}); "
            f"{kept if self.state_file.is_file() else 'no epoch was finished'}. Lower --lr or --clip-grad, or train in "
            "full precision (--precision no); the same command goes on with these."
        )

    def _save_state(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "model": self.model.state_dict(),
                "average": self.average.module.state_dict() if self.average else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
                "step": self.progress.step,
                "history": self.progress.history,
                "loss": self.progress.loss,
                "changes": self.progress.changes,
                "settings": self.settings.model_dump(include=set(MAY_CHANGE)),
            }
            with new_file(self.state_file) as partial:
                torch.save(state, partial)
        self.accelerator.wait_for_everyone()

    def _load_state(self) -> None:
        if not self.state_file.is_file():
            return
        try:
            state = torch.load(self.state_file, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            if self.average:
                self.average.module.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.progress = Progress(
                step=state["step"],
                history=state["history"],
                loss=state["loss"],
                changes=state["changes"],
            )
            self._note_changes(state["settings"])
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{self.state_file} cannot be used ({reason}); start anew with --restart.") from error

    def _note_changes(self, former: dict[str, Any]) -> None:
        changed = {name: value for name, value in former.items() if value != getattr(self.settings, name)}
        if changed:
            until = len(self.progress.history) + (self.progress.loss is not None)
            self.progress.changes.append({"until_epoch": until, **changed})
        if "learning_rate" in changed:
            # The optimizer's state brings the former one back, which a schedule need not overwrite.
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.learning_rate


def images_per_pass(settings: TrainingSettings, images: int, processes: int) -> int:
    """How many of a batch's images one process takes at a time; `InputError` where a batch cannot be shared out."""
    shares = processes * settings.accumulation
    if settings.batch_size % shares:
        raise InputError(
            f"A batch of {settings.batch_size} images does not divide into {processes} processes "
            f"times {settings.accumulation} accumulated passes; choose a multiple."
        )
    if images < settings.batch_size:
        raise InputError(
            f"The training set has {images} images, fewer than one batch of {settings.batch_size}; "
            "lower --batch-size or give more images."
        )
    return settings.batch_size // shares


def _drop_patches(model: nn.Module, share: float) -> nn.Module | None:
    """Let a ViT leave out `share` of its patches while training, in place; None when none are to be left out."""
    if not share:
        return None
    if not isinstance(getattr(model, "patch_drop", None), nn.Identity):
        raise InputError(f"{type(model).__name__} cannot leave out patches; train it without --patch-drop.")
    model.patch_drop = PatchDropout(share, num_prefix_tokens=cast(int, model.num_prefix_tokens))
    return model.patch_drop
