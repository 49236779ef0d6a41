"""One table of thresholds, changed by what a user writes, and nothing else."""

import pytest

from export.thresholds import THRESHOLDS, Thresholds, thresholds_with
from flora.errors import InputError


def test_a_drop_is_allowed_wherever_one_was_limited_and_an_override_comes_last():
    table = thresholds_with(0.2, ["fp16.min_agreement=0.95", "int8.max_drop=none", "fp32.max_kl=1e-3"])
    assert table["lowrank"].max_drop == table["fp16"].max_drop == 0.2
    assert table["fp32"] == THRESHOLDS["fp32"].model_copy(update={"max_kl": 1e-3})
    assert table["fp16"] == THRESHOLDS["fp16"].model_copy(update={"max_drop": 0.2, "min_agreement": 0.95})
    assert table["int8"].max_drop is None
    assert table["fp8"] == THRESHOLDS["fp8"].model_copy(update={"max_drop": 0.2})


def test_without_changes_a_table_stays_as_it_is():
    table = thresholds_with(0.2)
    assert thresholds_with(None, (), table) == table
    assert THRESHOLDS["lowrank"].max_drop == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp16", "write KIND.NAME=VALUE"),
        ("fp61.max_kl=1", "known are lowrank.*Did you mean fp16"),
        ("fp16.max_lk=1", "no threshold; known are min_agreement"),
        ("fp16.max_kl=much", "'much' is no number"),
        ("fp16.max_kl=nan", "max_kl is 0 or more, got nan"),
        ("fp16.max_kl=inf", "max_kl is 0 or more, got inf"),
        ("fp16.min_cosine=1.1", "min_cosine is from 0 to 1, got 1.1"),
    ],
)
def test_what_is_no_threshold_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        thresholds_with(None, [text])


def test_a_limit_is_held_by_figures_on_its_right_side_and_by_none():
    limits = Thresholds(min_agreement=0.9, max_drop=1.0)
    assert limits.exceeded({"agreement": 0.9, "drop": 1.0}) == []
    assert limits.exceeded({"agreement": None, "kl": 5.0}) == []
    assert limits.exceeded({"agreement": 0.89, "drop": 1.01}) == [
        "agreement is 0.89, below 0.9",
        "drop is 1.01, above 1",
    ]
