"""The presets train as the paper's released configurations do, and what cannot be is refused by its name."""

import pytest
from pydantic import ValidationError

from flora.errors import InputError
from flora.training.settings import AUGMENTATIONS, PRESETS, TrainingSettings, training_settings

# Rates are those of the batch of 1024: twice the ones that the configurations give for 512.
PAPER = {
    "batch_size": 1024,
    "optimizer": "adamw",
    "schedule": "cosine",
    "min_learning_rate": 1e-6,
    "warmup_epochs": 5,
    "warmup_learning_rate": 1e-6,
    "weight_decay": 0.01,
    "clip_grad": 5.0,
    "ema_decay": None,
    "precision": "fp16",
    "sampling": "low-rank-aware",
    "sandwich": None,
    "label_smoothing": 0.1,
    "patch_drop": 0.0,
    "seed": 0,
}
OUT_OF_RANGE = [
    ("epochs", 0),
    ("batch_size", 0),
    ("accumulation", 0),
    ("learning_rate", 0.0),
    ("learning_rate", float("nan")),
    ("min_learning_rate", -1e-6),
    ("warmup_epochs", -1),
    ("warmup_learning_rate", -1e-6),
    ("weight_decay", -0.1),
    ("clip_grad", 0.0),
    ("ema_decay", 0.0),
    ("ema_decay", 1.0),
    ("precision", "fp8"),
    ("sampling", "sandwich"),
    ("sandwich", -1),
    ("task_weight", 1.1),
    ("task_weight", -0.1),
    ("temperature", 0.0),
    ("label_smoothing", 1.0),
    ("patch_drop", 1.0),
    ("patch_drop", -0.1),
    ("seed", -1),
]


@pytest.mark.parametrize(
    ("preset", "own"),
    [("deit-s", {"epochs": 300, "learning_rate": 1.5e-4}), ("deit-b", {"epochs": 150, "learning_rate": 5e-5})],
)
def test_a_paper_preset_holds_the_released_hyper_parameters(preset: str, own: dict):
    settings = training_settings(preset).model_dump()
    assert {key: settings[key] for key in PAPER | own} == PAPER | own


@pytest.mark.parametrize("preset", ["deit-s", "deit-b"])
def test_a_paper_preset_augments_as_released(preset: str):
    assert training_settings(preset).augmentation.model_dump() == {
        "scale": (0.08, 1.0),
        "ratio": (0.75, 4 / 3),
        "hflip": 0.5,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "color_jitter": 0.4,
        "erase": 0.25,
        "mixup": 0.0,
        "cutmix": 0.0,
    }


@pytest.mark.parametrize("preset", ["deit-s", "deit-b"])
def test_a_paper_preset_learns_from_the_teachers_probabilities_alone(preset: str):
    settings = training_settings(preset)
    assert (settings.task_weight, settings.temperature) == (0.0, 1.0)


def test_the_local_preset_trains_one_block_as_the_papers_filter_does():
    settings = training_settings("local")
    assert (settings.epochs, settings.warmup_epochs, settings.weight_decay) == (20, 3, 0.01)
    assert (settings.sampling, settings.clip_grad) == ("uniform", 5.0)


def test_the_rates_of_the_local_preset_are_the_papers_for_its_batch():
    """The released code scales all three rates with the batch; its rates for DeiT-S are those of 1024 images."""
    settings = training_settings("local")
    rates = (settings.learning_rate, settings.min_learning_rate, settings.warmup_learning_rate)
    assert [rate / settings.batch_size * 1024 for rate in rates] == pytest.approx([1.5e-4, 1e-6, 1e-6])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_lies_in_range_and_survives_json(preset: str):
    settings = training_settings(preset)
    assert settings == PRESETS[preset]
    assert TrainingSettings.model_validate_json(settings.model_dump_json()) == settings


def test_a_change_is_made_and_none_leaves_the_preset_as_it_is():
    changed = training_settings("deit-b", epochs=6, learning_rate=None, augmentation="light")
    assert changed == PRESETS["deit-b"].model_copy(update={"epochs": 6, "augmentation": AUGMENTATIONS["light"]})


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name(name: str, value):
    with pytest.raises(InputError, match=rf"^{name}: .*got {value}\.$"):
        training_settings(**{name: value})


@pytest.mark.parametrize(("epochs", "warmup"), [(3, 5), (5, 5), (1, 1), (2, 2.5)])
def test_a_warm_up_that_leaves_no_epoch_is_refused_with_both_numbers_and_what_to_add(epochs: int, warmup: float):
    said = rf"warm-up of {warmup} epochs .* run of {epochs}; add --warmup-epochs N with N below {epochs}"
    with pytest.raises(InputError, match=said):
        training_settings(epochs=epochs, warmup_epochs=warmup)
    with pytest.raises(InputError, match=said):
        training_settings(epochs=9, warmup_epochs=warmup).with_epochs(epochs)


@pytest.mark.parametrize("preset", ["deit-s", "deit-b"])
def test_a_paper_preset_for_few_epochs_needs_a_shorter_warm_up(preset: str):
    with pytest.raises(InputError, match=r"warm-up of 5 epochs .* run of 2; add --warmup-epochs"):
        training_settings(preset, epochs=2)
    assert training_settings(preset, epochs=2, warmup_epochs=0.5).warmup_epochs == 0.5


def test_other_epochs_leave_all_else_as_it_is():
    settings = training_settings("deit-s", seed=3)
    assert settings.with_epochs(7) == training_settings("deit-s", seed=3, epochs=7)


def test_a_setting_that_there_is_not_is_refused_by_name():
    with pytest.raises(InputError, match=r"^epoch: .*got 3\.$"):
        training_settings(epoch=3)


@pytest.mark.parametrize(("preset", "near"), [("deit-x", "deit-s"), ("deitb", "deit-b"), ("locale", "local")])
def test_an_unknown_preset_is_refused_with_all_there_are_and_the_near_ones(preset: str, near: str):
    with pytest.raises(InputError, match=rf"'{preset}'; there are {', '.join(PRESETS)}\. Did you mean .*{near}"):
        training_settings(preset)


def test_a_preset_like_none_is_answered_without_a_guess():
    with pytest.raises(InputError, match=rf"'xyz'; there are {', '.join(PRESETS)}\.$"):
        training_settings("xyz")


def test_an_unknown_augmentation_is_refused_with_those_there_are():
    with pytest.raises(InputError, match="'heavy'; there are light, imagenet"):
        training_settings(augmentation="heavy")


def test_settings_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        training_settings().epochs = 3
