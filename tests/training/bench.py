"""Training runs for tests: a tiny supernet or model on twenty images, and what is read of its weights."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from flora.lowrank.supernet import build_supernet, elastic_layers
from flora.ranks.cost import ModelCost
from flora.ranks.space import SearchSpace, blocks_of
from flora.training.alone import Alone
from flora.training.augmentation import AugmentedImages
from flora.training.data import TimmImages
from flora.training.settings import AUGMENTATIONS, Augmentation, TrainingSettings
from flora.training.teacher import TeacherCache, TeacherFacts
from flora.training.train import Teacher, Trainer
from tests.samples import GREY, tiny_model

CPU = torch.device("cpu")
STEPS_PER_EPOCH = 5
STILL = Augmentation(scale=(1, 1), ratio=(1, 1), hflip=0)
MIXED = Augmentation(mixup=0.8, cutmix=1.0)
RANKS = (6, 12, 24, "dense")


class StoppedError(Exception):
    pass


class Bench:
    """Makes training runs on twenty images: three epochs of five steps of four images, where nothing else is said."""

    def __init__(self, folder: Path, images: Path, cost: ModelCost) -> None:
        self.folder, self.images, self.cost = folder, TimmImages(str(images), GREY), cost
        self.factorized = supernet_of(cost)

    def space(self, ranks: tuple = RANKS) -> SearchSpace:
        names = list(self.cost.shapes)
        return SearchSpace(choices=dict.fromkeys(names, ranks), blocks=blocks_of(names))

    def teacher(self, *, cached: str | None = None, top_k: int = 10) -> Teacher:
        module = named_as_grey(tiny_model(seed=5))
        if cached is None:
            return Teacher(module=module)
        facts = TeacherFacts(teacher_sha256="t", classes=10, top_k=top_k, transform="t")
        keys = tuple(int(digest, 16) for digest in self.images.digests())
        return Teacher(module=module, cache=TeacherCache(self.folder / cached, facts), image_keys=keys)

    def trainer(
        self,
        model: nn.Module | None = None,
        *,
        state: str = "state.pt",
        ranks: tuple = RANKS,
        augmentation: Augmentation = AUGMENTATIONS["light"],
        teacher: Teacher | None = None,
        supernet: nn.Module | None = None,
        together=None,
        **changes,
    ) -> Trainer:
        """A run of `model` as it is, or of `supernet` (a fresh one) with `ranks` to choose from."""
        settings = TrainingSettings(
            **{"epochs": 3, "batch_size": 4, "learning_rate": 1e-3, "augmentation": augmentation} | changes
        )
        if model is None and supernet is None:
            supernet = copy.deepcopy(self.factorized)
        trained = supernet if model is None else model
        return Trainer(
            named_as_grey(trained),
            AugmentedImages(self.images, augmentation, seed=settings.seed),
            settings,
            accelerator=together or Alone(CPU, settings.precision),
            state_file=self.folder / state,
            space=self.space(ranks) if model is None else None,
            cost=self.cost if model is None else None,
            teacher=teacher,
        )

    def trained(self, model: nn.Module | None = None, *, state: str = "state.pt", **options) -> Tensor:
        """The weights after a whole run that leaves no state behind."""
        trained = weights(self.trainer(model, state=state, **options).run())
        (self.folder / state).unlink()
        return trained


def supernet_of(cost: ModelCost) -> nn.Module:
    model = tiny_model()
    build_supernet(model, cost, method="svd")
    return model


def named_as_grey(model: nn.Module) -> nn.Module:
    """`model` with the normalization of the images, which timm's distillation reads there."""
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": GREY.mean, "std": GREY.std}
    return model


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def components(supernet: nn.Module) -> dict[str, list[Tensor]]:
    """The factors of each layer with the components along dimension 0, copied."""
    factors = {
        name: [part for part in (layer.down, layer.up.T, layer.inner_bias) if part is not None]
        for name, layer in elastic_layers(supernet).items()
    }
    return {name: [part.detach().clone() for part in parts] for name, parts in factors.items()}


def stop_at(step: int) -> Callable[[int, float], None]:
    def on_step(done: int, loss: float) -> None:
        if done == step:
            raise StoppedError

    return on_step
