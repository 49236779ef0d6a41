"""The plan of a compression: what it refuses, what it says, and that it writes nothing."""

import json

import pytest

from tests.flora_command import flora
from tests.pipeline.tables import latency_table

ROADS = {
    "training-free": ("--calib-data", "calibration"),
    "supernet": (
        "--method",
        "supernet",
        "--data",
        "training",
        "--select-data",
        "selection",
        "--epochs",
        3,
        "--batch-size",
        16,
    ),
}


def command(worked, road: str, tmp_path, *more: object) -> tuple[object, ...]:
    images = {"calibration": worked.calibration, "training": worked.training, "selection": worked.selection}
    options = tuple(images.get(option, option) for option in ROADS[road])
    return ("compress", worked.dense, *options, "--threads", 1, "-o", tmp_path / "bundle", "--dry-run", *more)


@pytest.mark.parametrize("road", ROADS)
def test_a_plan_says_what_is_within_reach_and_the_time_of_each_step_and_writes_nothing(worked, tmp_path, road):
    outcome = flora(*command(worked, road, tmp_path, "--budget", "macs=60%", "--json"))
    assert outcome.code == 0, outcome
    plan = json.loads(outcome.out)["macs=60%"]
    macs = [plan["reach"][name][0] for name in ("smallest", "middle", "largest", "dense")]
    assert macs == sorted(macs)
    assert macs[0] < macs[-1]
    assert all(step["seconds"] > 0 for step in plan["steps"])
    assert plan["seconds"] == pytest.approx(sum(step["seconds"] for step in plan["steps"]))
    steps = {step["what"]: step["images"] for step in plan["steps"]}
    if road == "supernet":
        assert steps["training the supernet, 3 epochs"] == 48
    else:
        assert (steps["factorizing"], steps["probing layers"]) == (64, 64)
    assert list(tmp_path.iterdir()) == []


def test_a_longer_training_takes_longer(worked, tmp_path):
    def seconds(epochs: int) -> float:
        outcome = flora(*command(worked, "supernet", tmp_path, "--budget", "macs=60%", "--epochs", epochs, "--json"))
        assert outcome.code == 0, outcome
        (step,) = (one for one in json.loads(outcome.out)["macs=60%"]["steps"] if one["what"].startswith("training"))
        return step["seconds"]

    assert seconds(300) > 10 * seconds(3)


@pytest.mark.parametrize("road", ROADS)
def test_a_plan_refuses_what_the_command_would_refuse(worked, tmp_path, road):
    refused = flora(*command(worked, road, tmp_path, "--budget", "macs=1%"))
    assert refused.code == 1, refused
    assert "below the smallest subnet" in refused.err
    family = flora(*command(worked, road, tmp_path, "--family", "60%,1%"))
    assert family.code == 1, family
    assert "macs=1%" in family.err
    for budgets in ((), ("--budget", "macs=60%", "--family", "60%,50%")):
        usage = flora(*command(worked, road, tmp_path, *budgets))
        assert usage.code == 2, usage
        assert "either --budget" in usage.err
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_people_counts_the_latency_table_where_it_is_to_be_measured(worked, tmp_path):
    outcome = flora(*command(worked, "training-free", tmp_path, "--budget", "latency=0.6x"))
    assert outcome.code == 0, outcome
    assert "measuring latency" in outcome.out
    assert "Nothing was written" in outcome.out


def test_a_plan_refuses_a_table_and_a_folder_that_the_command_would_refuse(worked, tmp_path):
    latency_table(worked, tmp_path / "latency.json")
    asked = command(worked, "training-free", tmp_path, "--latency-table", tmp_path / "latency.json")
    for budgets, says in (
        (("--family", "latency=0.8x,latency=0.01x"), "below the smallest subnet"),
        (("--family", "70%,60%"), "--latency-table serves budgets such as latency=0.6x"),
        (("--budget", "latency=0.8x@b4"), "no batch 4"),
        (("--budget", "latency=0.8x", "--threads", 2), "Give --threads 1, as it was measured, or measure one here"),
        (("--family", ""), "is no family"),
    ):
        refused = flora(*asked, *budgets)
        assert refused.code in (1, 2), refused
        assert says in refused.message
    mixed = flora(*asked, "--family", "70%, latency=0.8x", "--json")
    assert mixed.code == 0, mixed
    assert list(json.loads(mixed.out)) == ["macs=70%", "latency=0.8x"]
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "notes.txt").write_text("mine")
    refused = flora(*command(worked, "training-free", tmp_path, "--budget", "macs=60%"))
    assert refused.code == 1, refused
    assert "manifest.json" in refused.message


def test_a_plan_says_what_is_tried_for_a_drop_and_that_images_are_too_few(worked, tmp_path):
    images = f"{worked.calibration.partition(',')[0]},limit=1"
    command = ("compress", worked.dense, "--calib-data", images, "--select-data", worked.selection, "--dry-run")
    outcome = flora(*command, "--budget", "drop=1", "--threads", 1, "-o", tmp_path / "bundle")
    assert outcome.code == 0, outcome
    assert "trying budgets" in outcome.out
    assert "fewer tokens than inputs" in " ".join(outcome.out.split())
