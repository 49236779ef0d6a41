"""How images become model input, as data: timm's evaluation settings, kept with every artefact."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, model_validator


class Preprocessing(BaseModel):
    """timm's evaluation transform in numbers. `input_size` is (channels, height, width); one channel means grey."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_size: tuple[PositiveInt, PositiveInt, PositiveInt]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = "bicubic"
    crop_pct: PositiveFloat = 0.875
    crop_mode: Literal["center", "squash", "border"] = "center"

    @model_validator(mode="after")
    def _check(self) -> Self:
        channels = self.input_size[0]
        if channels not in (1, 3):
            raise ValueError(f"input_size must have 1 or 3 channels, got {channels}")
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise ValueError(f"mean and std need {channels} values each, std above 0; got {self.mean} and {self.std}")
        return self

    @property
    def image_mode(self) -> str:
        """Pillow's mode of the images before preprocessing."""
        return "L" if self.input_size[0] == 1 else "RGB"
