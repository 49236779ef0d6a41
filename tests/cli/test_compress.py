"""`flora compress` without training, as it is typed by default."""

import json

from flora.lowrank.checkpoint import load_model_folder
from tests.flora_command import flora, leftovers
from tests.worked_example import WorkedExample


def test_without_a_method_it_allocates_exports_and_verifies(worked: WorkedExample, tmp_path):
    out = tmp_path / "bundle"
    command = (
        *("compress", worked.dense, "--calib-data", worked.calibration, "--eval-data", worked.images),
        *("--budget", "macs=70%", "--space", "multiples=2", "--max-drop", 100, "--threads", 1, "-o", out),
    )
    outcome = flora(*command, "--json")
    assert outcome.code == 0, outcome.err
    manifest = json.loads(outcome.out)
    assert {entry["name"] for entry in manifest["artifacts"]} >= {"dense, ONNX Runtime", "factorized, ONNX Runtime"}
    assert all(entry["status"] in ("verified", "in torch") for entry in manifest["artifacts"])
    model = load_model_folder(out / "model")
    assert {role: record.images for role, record in model.config.image_sets.items()} == {
        "calibration": 64,
        "selection": 64,
    }
    assert leftovers(tmp_path) == []
    again = flora(*command)
    assert again.code == 0, again
    assert f"flora: {out} is finished; there is nothing to do" in again.message
    assert "factorized, ONNX Runtime" in again.out
    assert json.loads((out / "manifest.json").read_text()) == manifest
