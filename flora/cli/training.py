"""From the training options of a command to settings."""

from typing import Any

from flora.cli.options import SETTING_OF
from flora.training.settings import TrainingSettings, training_settings


def settings_from_options(options: dict[str, Any], *, preset: str = "default") -> TrainingSettings:
    """The settings of `preset` (or of --preset) with the options that were given."""
    given = {SETTING_OF.get(name, name): value for name, value in options.items() if value is not None}
    return training_settings(given.pop("preset", preset), augmentation=given.pop("augmentation", None), **given)
