"""How to train: one set of settings for supernets and compact models, with the paper's as presets.

No torch here, for the help of the command line names the defaults.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flora.errors import InputError, near_matches


class Augmentation(BaseModel):
    """Arguments of timm's training transform, and mixing of images (`mixup`, `cutmix`: their alphas)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = Field(default=0.5, ge=0, le=1)
    auto_augment: str | None = None
    color_jitter: float | None = None
    erase: float = Field(default=0.0, ge=0, le=1)
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


AUGMENTATIONS = {
    "light": Augmentation(scale=(0.75, 1.0), ratio=(0.9, 1.1), erase=0.15),
    "imagenet": Augmentation(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, erase=0.25),
}


# What a run may go on with otherwise, say after a loss that was no number.
MAY_CHANGE = ("learning_rate", "min_learning_rate", "warmup_learning_rate", "clip_grad", "precision")


class TrainingSettings(BaseModel):
    """`batch_size` counts the images of one optimizer step, over all processes and accumulated passes.

    `task_weight` is the share of the labels in the loss when there is a teacher; the rest is distillation at
    `temperature`. `sandwich` trains the largest, the smallest and that many sampled subnets in each step instead of
    one sampled subnet. `patch_drop` is the share of patches that a ViT leaves out while training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=128, ge=1)
    accumulation: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    min_learning_rate: float = Field(default=1e-6, ge=0)
    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_learning_rate: float = Field(default=1e-6, ge=0)
    optimizer: str = "adamw"
    schedule: str = "cosine"
    weight_decay: float = Field(default=0.01, ge=0)
    clip_grad: float | None = Field(default=5.0, gt=0)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    precision: Literal["no", "fp16", "bf16"] = "no"
    sampling: Literal["low-rank-aware", "uniform"] = "low-rank-aware"
    sandwich: int | None = Field(default=None, ge=0)
    task_weight: float = Field(default=0.0, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    patch_drop: float = Field(default=0.0, ge=0, lt=1)
    seed: int = Field(default=0, ge=0)
    augmentation: Augmentation = AUGMENTATIONS["light"]

    @model_validator(mode="after")
    def _check_warmup(self) -> "TrainingSettings":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"a warm-up of {self.warmup_epochs:g} epochs does not fit into a run of {self.epochs}; "
                f"add --warmup-epochs N with N below {self.epochs} (0: no warm-up), or give more epochs"
            )
        return self

    def with_epochs(self, epochs: int) -> "TrainingSettings":
        """The same for another number of epochs; `InputError` where the warm-up does not fit into them."""
        return _validated(self.model_dump() | {"epochs": epochs})


# The released configurations: rates are for the batch of 1024 on eight GPUs, warm-up lies inside the cosine.
_PAPER = TrainingSettings(
    batch_size=1024,
    min_learning_rate=1e-6,
    warmup_epochs=5,
    warmup_learning_rate=1e-6,
    weight_decay=0.01,
    clip_grad=5.0,
    precision="fp16",
    augmentation=AUGMENTATIONS["imagenet"],
)
PRESETS = {
    "default": TrainingSettings(),
    "deit-s": _PAPER.model_copy(update={"epochs": 300, "learning_rate": 1.5e-4}),
    "deit-b": _PAPER.model_copy(update={"epochs": 150, "learning_rate": 5e-5}),
    # One block's supernet of the paper's filter for DeiT-S: its rates for 1024 images, scaled to the batch of 128.
    "local": TrainingSettings(
        epochs=20,
        batch_size=128,
        learning_rate=1.5e-4 / 8,
        min_learning_rate=1e-6 / 8,
        warmup_epochs=3,
        warmup_learning_rate=1e-6 / 8,
        sampling="uniform",
    ),
}


def training_settings(preset: str = "default", *, augmentation: str | None = None, **changes: Any) -> TrainingSettings:
    """A preset with `changes` (those that are not None); `InputError` names what is out of range."""
    if preset not in PRESETS:
        raise InputError(
            f"There is no preset {preset!r}; there are {', '.join(PRESETS)}.{near_matches(preset, PRESETS)}"
        )
    if augmentation is not None and augmentation not in AUGMENTATIONS:
        raise InputError(f"There is no augmentation {augmentation!r}; there are {', '.join(AUGMENTATIONS)}.")
    values = PRESETS[preset].model_dump() | {key: value for key, value in changes.items() if value is not None}
    if augmentation is not None:
        values["augmentation"] = AUGMENTATIONS[augmentation].model_dump()
    return _validated(values)


def _validated(values: dict[str, Any]) -> TrainingSettings:
    try:
        return TrainingSettings.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        if not problem["loc"]:
            raise InputError(f"The settings do not fit together: {problem['ctx']['error']}.") from error
        raise InputError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {problem['input']}.") from error
