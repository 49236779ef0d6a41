"""From the training options of a command to settings."""

from typing import Any

from flora.training.settings import TrainingSettings, training_settings

# Options by the name of the setting that they change, where the two differ.
SETTING_OF = {"lr": "learning_rate", "min_lr": "min_learning_rate", "warmup_lr": "warmup_learning_rate"}


def settings_from_options(options: dict[str, Any], *, preset: str = "default") -> TrainingSettings:
    """The settings of `preset` (or of --preset) with the options that were given."""
    given = {SETTING_OF.get(name, name): value for name, value in options.items() if value is not None}
    return training_settings(given.pop("preset", preset), augmentation=given.pop("augmentation", None), **given)
