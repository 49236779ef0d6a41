"""`flora latency-table`: what it prints, writes and refuses."""

import json

from flora.ranks.latency import LatencyTable
from tests.clocked_device import ClockedDevice
from tests.flora_command import flora
from tests.worked_example import WorkedExample


def test_it_writes_a_table_and_says_from_which_ranks_on_factors_do_not_pay(
    worked: WorkedExample, tmp_path, monkeypatch
):
    ClockedDevice(monkeypatch)
    out = tmp_path / "latency.json"
    command = ("latency-table", worked.dense, "--batch", "2", "--points", 3, "-o", out)
    outcome = flora(*command, "--json")
    assert outcome.code == 0, outcome.err
    printed = json.loads(outcome.out)
    assert LatencyTable.load(out).conditions == [(2, "fp32")]
    # On this device time goes by MACs alone.
    assert all(abs(one["measured"] - one["macs"]) <= 1 for one in printed["break_even_ranks"])
    (model,) = printed["models"]
    assert max(map(abs, model["errors"].values())) < 0.01
    again = flora(*command)
    assert again.code == 0, again
    assert f"flora: {out} is finished" in again.message
    assert "Wrote the latency table" in again.out


def test_batches_and_precisions_that_cannot_be_measured_are_refused(worked: WorkedExample, tmp_path):
    for option, value, message in (
        ("--batch", "many", "are no batch sizes; write 1,8,32"),
        ("--precision", "fp16", "ort-cpu is measured in fp32 and int8, given: fp16"),
        ("--runtime", "ort-gpu", "Did you mean ort-cpu"),
        ("--layers", "norm", "No linear layer is selected by norm"),
    ):
        outcome = flora("latency-table", worked.dense, option, value, "-o", tmp_path / "latency.json")
        assert outcome.code in (1, 2)
        assert message in outcome.message
    assert list(tmp_path.iterdir()) == []
