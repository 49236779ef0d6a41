"""The main job on a tiny model: build, materialize, eval, export and verify, each by its command."""

import json
import zipfile
from pathlib import Path

import onnx
import pytest
from PIL import Image
from safetensors import safe_open

from flora.artifact import sha256_of_file
from tests.flora_command import flora, leftovers
from tests.worked_example import MODEL, WorkedExample


def evaluated(model: Path, worked: WorkedExample, *more: object) -> dict:
    outcome = flora("eval", model, "--data", worked.images, "--json", *more)
    assert (outcome.code, outcome.err.strip()) == (0, "")
    return json.loads(outcome.out)


def test_build_says_what_it_built_as_json(worked):
    supernet = worked.supernet
    said = json.loads(worked.outcomes["build"].out)
    assert said["supernet"] == str(supernet)
    assert (said["model"], said["layers"], said["calibration_images"]) == (MODEL, 6, 64)
    assert 0 < said["smallest_macs"] < said["dense_macs"]


def test_materialize_says_what_it_made_as_json(worked):
    compact = worked.compact
    said = json.loads(worked.outcomes["materialize"].out)
    assert said["model"] == str(compact)
    assert said["factored_layers"] + said["dense_layers"] == 6
    assert 0 < said["macs_share"] < 1
    assert 0 < said["params_share"] < 1


def test_materialize_writes_the_ranks_beside_the_model(worked, tmp_path):
    again = tmp_path / "again"
    outcome = flora("materialize", worked.supernet, "--ranks", worked.compact / "ranks.json", "-o", again)
    assert outcome.code == 0, outcome
    assert sha256_of_file(again / "model.safetensors") == sha256_of_file(worked.compact / "model.safetensors")


def test_every_json_output_is_one_document_and_nothing_on_stderr(worked):
    assert worked.compact.is_dir()
    for command in ("build", "materialize"):
        outcome = worked.outcomes[command]
        assert isinstance(json.loads(outcome.out), dict)
        assert outcome.err.strip() == ""


def test_the_dense_model_is_right_on_the_images_that_it_labelled(worked):
    accuracy = evaluated(worked.dense, worked)
    assert (accuracy["images"], accuracy["top1"], accuracy["top1_standard_error"]) == (120, 100, 0)


def test_eval_of_a_timm_name_with_a_checkpoint_is_eval_of_the_folder(worked):
    arguments = json.loads((worked.dense / "config.json").read_text())["args"]
    kwargs = [text for key, value in arguments.items() for text in ("-K", f"{key}={value}")]
    outcome = flora(
        *("eval", MODEL, "--checkpoint", worked.dense / "model.safetensors", *kwargs, "--data", worked.images),
        "--json",
    )
    assert outcome.code == 0, outcome
    # Mean and crop are timm's, not those that the folder brings; size and channels are the model's.
    assert json.loads(outcome.out)["images"] == 120


def test_a_supernet_at_full_rank_answers_as_the_dense_model(worked):
    assert evaluated(worked.supernet, worked)["top1"] == 100


def test_a_supernet_at_the_ranks_of_the_compact_model_answers_like_it(worked):
    subnet = evaluated(worked.supernet, worked, "--ranks", worked.ranks)
    compact = evaluated(worked.compact, worked)
    assert subnet["top1"] == compact["top1"]
    assert subnet["loss"] == pytest.approx(compact["loss"], rel=1e-4)


def test_export_measures_the_accuracy_that_eval_measures(worked):
    compact = evaluated(worked.compact, worked)
    stages = {stage["name"]: stage for stage in worked.manifest["verification"]["stages"]}
    assert stages["dense, torch"]["top1"] == 100
    assert compact["top1"] < 100
    for name in ("factorized, torch", "factorized, ONNX Runtime, batch 1", "factorized, ONNX Runtime, batch 8"):
        assert stages[name]["top1"] == pytest.approx(compact["top1"], abs=1e-9)
        assert stages[name]["top1_standard_error"] == pytest.approx(compact["top1_standard_error"])


def test_export_prints_its_stages_what_it_recommends_and_the_next_command(worked):
    bundle = worked.bundle
    outcome = worked.outcomes["export"]
    for words in (
        "dense, torch",
        "factorized, ONNX Runtime, batch 8",
        "latency ratio",
        "100.00 %",
        "Recommended: onnx/",
    ):
        assert words in outcome.out
    assert f"Wrote the bundle {bundle}" in outcome.out
    assert f"Next: flora verify {bundle} --data {worked.images}" in outcome.out
    assert "Traceback" not in outcome.err


def test_a_bundle_holds_what_its_manifest_lists(worked):
    manifest = worked.manifest
    found = {path.relative_to(worked.bundle).as_posix() for path in worked.bundle.rglob("*") if path.is_file()}
    assert found == {"manifest.json", *manifest["files"]}
    assert {entry["path"] for entry in manifest["artifacts"]} <= found
    for name, digest in manifest["files"].items():
        assert sha256_of_file(worked.bundle / name) == digest
    for entry in manifest["artifacts"]:
        assert entry["status"] == "verified"
        assert entry["size_bytes"] == (worked.bundle / entry["path"]).stat().st_size
    assert manifest["command"][:2] == ["flora", "export"]
    assert manifest["recommended"] in {entry["name"] for entry in manifest["artifacts"]}


def test_a_bundle_can_be_read_by_others_than_its_owner(worked):
    for path in (worked.bundle, *worked.bundle.rglob("*")):
        assert path.stat().st_mode & 0o044 == 0o044, f"{path} is closed to all but its owner"


def test_nothing_in_a_bundle_is_pickled(worked):
    files = [path for path in worked.bundle.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".onnx", ".html", ".png"}
    for path in files:
        assert not zipfile.is_zipfile(path)
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".html":
            assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                picture.verify()
        elif path.suffix == ".onnx":
            onnx.checker.check_model(onnx.load(path))
        else:
            with safe_open(path, "np") as tensors:
                assert len(list(tensors.keys())) > 0


def test_verify_passes_a_bundle_and_says_so_as_json(worked):
    outcome = flora("verify", worked.bundle, "--data", worked.images, "--max-drop", 100, "--threads", 1, "--json")
    said = json.loads(outcome.out)
    assert (outcome.code, outcome.err.strip()) == (0, "")
    assert (said["passed"], said["problems"], said["not_run"]) == (True, [], [])
    exported = worked.manifest["verification"]["stages"]
    assert said["report"]["stages"][-1]["top1"] == exported[-1]["top1"]


def test_build_and_materialize_name_the_next_command(worked, tmp_path):
    supernet, compact = tmp_path / "supernet", tmp_path / "compact"
    built = flora("build", worked.dense, "--method", "svd", "-o", supernet)
    assert built.code == 0, built
    assert f"Wrote the supernet {supernet}" in built.out
    assert f"Next: flora materialize {supernet} " in built.out
    made = flora("materialize", supernet, "--uniform-macs", "60%", "-o", compact)
    assert made.code == 0, made
    assert f"Wrote the compact model {compact}" in made.out
    assert f"Next: flora export {compact} " in made.out
    assert leftovers(tmp_path) == []


def test_both_commands_that_build_names_next_run(worked, tmp_path):
    """With the default space, whose blocks a filter can list."""
    built = flora("build", worked.dense, "--method", "svd", "-o", tmp_path / "supernet")
    assert flora(*_next(built.out)).code == 0
    words = next(line for line in built.out.splitlines() if line.startswith("  or: flora ")).split()[2:]
    assert words[0] == "filter"
    selection = f"{worked.selection},limit=9"
    assert flora(*(selection if word == "IMAGES" else word for word in words), "--threads", 1).code == 0


def test_the_command_that_a_passed_export_names_next_passes(worked):
    """Limits that the export was given hold for the check of it as well."""
    assert worked.bundle.is_dir()
    checked = flora(*_next(worked.outcomes["export"].out))
    assert checked.code == 0, checked.message


def test_an_output_of_the_same_kind_is_replaced(worked, tmp_path):
    compact = tmp_path / "compact"
    for ratio in (0.2, 0.4):
        assert flora("materialize", worked.supernet, "--uniform", ratio, "-o", compact).code == 0
    assert evaluated(compact, worked)["images"] == 120
    assert leftovers(tmp_path) == []


def _next(out: str) -> list[str]:
    line = next(line for line in out.splitlines() if line.startswith("Next: flora "))
    return line.removeprefix("Next: flora ").split()
