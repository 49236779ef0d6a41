"""Families: several budgets from one supernet, and which members are worth their time."""

import json
from pathlib import Path

import pytest

from export.bundle import Bundle
from flora.errors import InputError
from flora.pipeline.family import FAMILY, Family, FamilyMember, _with_pareto, budgets_of_family, compress_family
from tests.flora_command import flora, leftovers


def member(budget: str, top1: float | None, ratio: float, **changes) -> FamilyMember:
    defaults = {
        "budget": budget,
        "precision": "fp32",
        "bundle": budget,
        "macs": 1,
        "params": 1,
        "size_bytes": 1,
        "top1": top1,
        "agreement": 90.0,
        "latency_ratio": ratio,
        "passed": True,
    }
    return FamilyMember(**defaults | changes)


def test_budgets_are_macs_unless_said():
    assert budgets_of_family("70%, 50%") == ("macs=70%", "macs=50%")
    assert budgets_of_family("latency=0.8x,latency=0.6x@b1") == ("latency=0.8x", "latency=0.6x@b1")


@pytest.mark.parametrize("text", ["70%", "70%,70%", "70%,macs=70%", ""])
def test_one_budget_is_no_family(text):
    with pytest.raises(InputError, match="two or more different budgets"):
        budgets_of_family(text)


def test_a_member_that_another_one_beats_is_not_on_the_pareto_front():
    members = [
        member("best", 90, 0.8),
        member("fast", 80, 0.4),
        member("beaten", 80, 0.5),
        member("failed", 95, 0.3, passed=False),
        member("the same", 80, 0.4),
        member("slower than dense", 90.5, 1.1),
    ]
    on_front = {one.budget for one in _with_pareto(members, 91.0) if one.is_pareto}
    assert on_front == {"best", "fast", "the same"}


def test_without_labels_agreement_decides():
    members = [member("agrees", None, 0.8, agreement=99.0), member("less", None, 0.9, agreement=98.0)]
    assert [one.is_pareto for one in _with_pareto(members, None)] == [True, False]


def test_a_folder_that_is_no_family_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"family\.json"):
        compress_family("vit", ("macs=50%", "macs=40%"), tmp_path, lambda budget, bundle: pytest.fail("was begun"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_family_with_a_failed_gate_says_which_and_keeps_all(worked, tmp_path):
    images = ("--calib-data", worked.calibration, "--eval-data", f"{worked.images},limit=20", "--threads", 1)
    out = tmp_path / "family"
    outcome = flora("compress", worked.dense, *images, "--family", "90%,40%", "--max-drop", 0.01, "-o", out)
    assert outcome.code == 3, outcome
    failed = [one.budget for one in Family.load(out / FAMILY).members if not one.passed]
    assert "macs=40%" in failed
    assert f"The gate failed for {', '.join(failed)}" in outcome.message
    assert all((out / one / "manifest.json").is_file() for one in ("macs-90pct", "macs-40pct"))


def test_a_stopped_family_keeps_what_it_has_and_goes_on(tmp_path):
    class StoppedError(Exception):
        pass

    def stopped(budget: str, bundle: Path) -> Bundle:
        raise StoppedError

    found = Family(model="vit", budgets=("macs=70%", "macs=50%"), members=(member("macs=70%", 90, 0.8),))
    (tmp_path / "family").mkdir()
    found.save(tmp_path / "family" / FAMILY)
    with pytest.raises(StoppedError):
        compress_family("vit", ("macs=70%", "macs=40%"), tmp_path / "family", stopped)
    kept = Family.load(tmp_path / "family" / FAMILY)
    assert (kept.budgets, [one.budget for one in kept.members]) == (("macs=70%", "macs=40%"), ["macs=70%"])
    with pytest.raises(StoppedError):
        compress_family("another", ("macs=70%", "macs=40%"), tmp_path / "family", stopped)
    assert Family.load(tmp_path / "family" / FAMILY).members == ()


def test_a_budget_out_of_reach_is_refused_before_the_first_bundle(worked, tmp_path):
    command = ("compress", worked.dense, "--calib-data", worked.calibration, "--threads", 1, "-o", tmp_path / "family")
    outcome = flora(*command, "--family", "70%,1%")
    assert outcome.code == 1, outcome
    assert "The budget macs=1%" in outcome.message
    assert list(tmp_path.iterdir()) == []


def test_a_family_comes_from_one_supernet_and_is_done_once(worked, tmp_path):
    out = tmp_path / "family"
    command = (
        *("compress", worked.dense, "--calib-data", worked.calibration, "--eval-data", f"{worked.images},limit=20"),
        *("--space", "multiples=2", "--max-drop", 100, "--threads", 1, "-o", out),
    )
    outcome = flora(*command, "--family", "70%,55%")
    assert outcome.code == 0, outcome
    family = Family.load(out / FAMILY)
    assert [one.budget for one in family.members] == ["macs=70%", "macs=55%"]
    assert family.members[0].macs > family.members[1].macs
    for one in family.members:
        manifest = json.loads((out / one.bundle / "manifest.json").read_text())
        entry = next(entry for entry in manifest["artifacts"] if entry["role"] == "candidate")
        assert (entry["macs"], entry["size_bytes"]) == (one.macs, one.size_bytes)
        assert manifest["latency"][entry["name"]]["ratio"] == one.latency_ratio
    steps = {path.name for path in (tmp_path / "family.work").iterdir()}
    assert {"supernet", "sensitivity", "compact-macs-70pct", "compact-macs-55pct"} < steps
    assert [line.partition(":")[0] for line in outcome.err.splitlines()].count("factorizing") == 1
    assert "Pareto" in outcome.out
    assert leftovers(tmp_path) == []

    again = flora(*command, "--family", "70%,55%", "--json")
    assert again.code == 0, again
    assert json.loads(again.out) == family.model_dump(mode="json")
    grown = flora(*command, "--family", "70%,60%")
    assert grown.code == 0, grown
    assert [one.budget for one in Family.load(out / FAMILY).members] == ["macs=70%", "macs=60%"]
    assert "factorizing" not in grown.err
    assert (out / "macs-55pct" / "manifest.json").is_file()
