"""How to train: one set of settings for supernets and compact models, with the paper's as presets."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flora.errors import InputError, near_matches
from flora.training.augmentation import AUGMENTATIONS, Augmentation


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
    # One block's supernet of the paper's filter.
    "local": TrainingSettings(epochs=20, learning_rate=1.5e-4, warmup_epochs=3, sampling="uniform"),
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
    try:
        return TrainingSettings.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {problem['input']}.") from error
