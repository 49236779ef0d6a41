"""`flora verify` passes a bundle as it was exported, anywhere, and nothing else."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from flora.lowrank.checkpoint import ModelConfig, save_model
from flora.preprocessing import Preprocessing
from tests.flora_command import assert_refused, flora
from tests.samples import tiny_args, tiny_model
from tests.worked_example import MODEL, QUICK, label_by, write_tar

COMPACT = "onnx/model-fp32.onnx"
COLOUR = Preprocessing(input_size=(3, 28, 28), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)


def rehash(bundle: Path, name: str) -> None:
    """Let the manifest vouch for the file as it is now."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    digest = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    manifest["files"][name] = digest
    for entry in manifest["artifacts"]:
        if entry["path"] == name:
            entry["sha256"] = digest
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def without_torch(*args: object) -> subprocess.CompletedProcess:
    """Run `flora ARGS` where torch, torchvision and timm are not installed."""
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'timm')));"
        "sys.argv = ['flora', *sys.argv[1:]]; from flora.cli import main; main()"
    )
    return subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True)


def test_a_copied_bundle_passes_without_images(bundle):
    outcome = flora("verify", bundle, "--threads", 1)
    assert outcome.code == 0, outcome
    count = len(json.loads((bundle / "manifest.json").read_text())["files"])
    assert f"Hashes: {count} files as exported." in outcome.out
    assert "reproduced by every ONNX file" in outcome.out
    assert "Recommended: onnx/" in outcome.out


def test_one_altered_byte_is_found_and_nothing_is_run(bundle, never_run):
    content = bytearray((bundle / COMPACT).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / COMPACT).write_bytes(content)
    outcome = flora("verify", bundle, "--json")
    assert_refused(outcome, f"{COMPACT} was altered", "Nothing of it was run", code=3)


@pytest.mark.parametrize("name", [COMPACT, "golden.safetensors", "model/config.json"])
def test_a_missing_file_is_named(bundle, never_run, name):
    (bundle / name).unlink()
    assert_refused(flora("verify", bundle), f"{name} is missing", code=3)


@pytest.mark.parametrize("name", ["onnx/other.onnx", "notes.txt"])
def test_an_added_file_is_named(bundle, never_run, name):
    (bundle / name).write_text("added")
    assert_refused(flora("verify", bundle), f"{name} is not part of the bundle", code=3)


def test_golden_outputs_that_were_changed_with_their_hash_are_found(bundle):
    golden = load_file(bundle / "golden.safetensors")
    golden[f"logits/{COMPACT}"] = golden[f"logits/{COMPACT}"][:, ::-1].copy()
    save_file(golden, bundle / "golden.safetensors")
    rehash(bundle, "golden.safetensors")
    outcome = flora("verify", bundle, "--threads", 1)
    assert outcome.code == 3
    assert "factorized, ONNX Runtime: against golden logits cosine is" in outcome.out
    assert "dense, ONNX Runtime: against" not in outcome.out
    assert "does not hold here" in outcome.message


def test_a_problem_with_golden_outputs_is_in_the_json(bundle):
    golden = load_file(bundle / "golden.safetensors")
    del golden[f"logits/{COMPACT}"]
    save_file(golden, bundle / "golden.safetensors")
    rehash(bundle, "golden.safetensors")
    outcome = flora("verify", bundle, "--threads", 1, "--json")
    said = json.loads(outcome.out)
    assert (outcome.code, said["passed"]) == (3, False)
    assert said["problems"] == [f"factorized, ONNX Runtime: golden.safetensors has no logits of {COMPACT}"]


def test_a_truncated_onnx_file_that_the_manifest_vouches_for_is_refused(bundle):
    content = (bundle / COMPACT).read_bytes()
    (bundle / COMPACT).write_bytes(content[: len(content) // 2])
    rehash(bundle, COMPACT)
    assert_refused(flora("verify", bundle, "--threads", 1), COMPACT, "no ONNX file that can run here")


def test_truncated_golden_outputs_are_refused(bundle):
    content = (bundle / "golden.safetensors").read_bytes()
    (bundle / "golden.safetensors").write_bytes(content[: len(content) // 2])
    rehash(bundle, "golden.safetensors")
    assert_refused(flora("verify", bundle, "--threads", 1), "golden.safetensors is no complete safetensors file")


def test_a_manifest_that_is_no_manifest_is_refused(bundle, never_run):
    (bundle / "manifest.json").write_text('{"schema_version": 1, "model": "vit"}')
    assert_refused(flora("verify", bundle), "is not a valid Manifest", "artifacts")


def test_a_manifest_of_another_schema_is_refused(bundle, never_run):
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text.replace('"schema_version": 1', '"schema_version": 2', 1))
    assert_refused(flora("verify", bundle), "schema_version")


def test_a_manifest_cannot_lead_out_of_the_bundle(bundle, never_run):
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text.replace(f'"{COMPACT}"', '"../outside.onnx"'))
    assert_refused(flora("verify", bundle), "leads out of the bundle")


@pytest.mark.parametrize("runtime", ["ort-cpu", "openvino"])
@pytest.mark.parametrize(("key", "place", "wrong"), [("preprocessing", "mean", [0.9]), ("class_names", 3, "4")])
def test_a_manifest_that_describes_another_model_is_found(bundle, runtime, key, place, wrong):
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest[key][place] = wrong
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    outcome = flora("verify", bundle, "--threads", 1, "--runtime", runtime, "--json")
    assert outcome.code == 3
    problems = json.loads(outcome.out)["problems"]
    assert len(problems) == 2
    for problem in problems:
        assert problem.startswith(f"manifest.json: {key} is ")
        assert "was exported with" in problem


def test_a_folder_that_is_no_bundle_is_refused(worked, tmp_path):
    assert_refused(flora("verify", worked.compact), "is no bundle: it holds no manifest.json")
    assert_refused(flora("verify", tmp_path / "none"), "is no bundle")


def test_low_rank_that_costs_too_much_fails_with_images(worked):
    outcome = flora("verify", worked.bundle, "--data", worked.images, "--max-drop", 0.5, "--threads", 1, "--json")
    said = json.loads(outcome.out)
    assert (outcome.code, said["passed"]) == (3, False)
    assert "The gate failed at factorized, ONNX Runtime, batch 1" in outcome.message
    failed = [stage for stage in said["report"]["stages"] if not stage["passed"]]
    assert [stage["failures"][0][:8] for stage in failed] == ["drop is "]


def test_a_threshold_may_be_changed_for_one_look_and_one_that_is_none_is_refused(worked):
    strict = ("verify", worked.bundle, "--data", worked.images, "--threads", 1, "--threshold")
    outcome = flora(*strict, "lowrank.max_drop=1", "--json")
    failed = [stage for stage in json.loads(outcome.out)["report"]["stages"] if not stage["passed"]]
    assert outcome.code == 3
    assert [(stage["name"], stage["failures"][0][:8]) for stage in failed] == [
        ("factorized, ONNX Runtime, batch 1", "drop is ")
    ]
    assert_refused(flora(*strict, "fp23.max_kl=1"), "Did you mean fp32")
    assert worked.manifest["thresholds"]["lowrank"]["max_drop"] == 100


def test_what_the_dense_model_is_expected_to_reach_can_be_said(worked):
    """At export it was right on all of these images."""
    few = ("verify", worked.bundle, "--data", f"{worked.images},limit=40", "--max-drop", 100, "--threads", 1)
    assert flora(*few).code == 0
    low = flora(*few, "--threshold", "lowrank.max_drop=none", "--expect-top1", 100)
    assert low.code == 0, low
    refused = flora("verify", worked.bundle, "--expect-top1", 90)
    assert (refused.code, "--data" in refused.message) == (2, True)


def test_a_file_that_the_runtime_does_not_run_is_left_out(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    entry = next(one for one in manifest["artifacts"] if one["name"].startswith("factorized"))
    entry["precision"] = "fp8"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    outcome = flora("verify", bundle, "--runtime", "openvino", "--threads", 1)
    assert outcome.code == 0, outcome
    assert f"Not run here: {entry['name']}: openvino runs no files in fp8." in outcome.out


def test_a_limit_that_is_no_number_does_not_switch_the_gate_off(worked):
    outcome = flora("verify", worked.bundle, "--data", worked.images, "--max-drop", "nan", "--threads", 1)
    assert outcome.code in (1, 2), "no drop is above NaN"
    assert "max-drop" in outcome.message


def test_calibration_images_prove_nothing(worked):
    assert_refused(flora("verify", worked.bundle, "--data", worked.calibration), "calibration set")


def test_a_data_set_of_more_classes_is_refused(worked, tmp_path):
    for label in range(11):
        (tmp_path / f"{label}").mkdir()
        Image.new("L", (28, 28), label).save(tmp_path / f"{label}" / "0.png")
    assert_refused(flora("verify", worked.bundle, "--data", tmp_path, "--threads", 1), "11 class folders", "10 classes")


def test_images_whose_channels_are_swapped_are_told_from_a_model_that_is_wrong(tmp_path):
    random = np.random.default_rng(0)
    hues = random.integers(0, 256, (10, 1, 1, 3))
    noise = random.integers(-30, 31, (100, 28, 28, 3))
    pixels = np.clip(np.tile(hues, (10, 1, 1, 1)) + noise, 0, 255).astype(np.uint8)
    model = tiny_model("vit", in_chans=3)
    classes = label_by(model, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
    save_model(tmp_path / "dense", model, ModelConfig(model=MODEL, args=tiny_args(in_chans=3), preprocessing=COLOUR))
    right = write_tar(tmp_path / "right.tar", [Image.fromarray(image) for image in pixels], classes)
    turned = [Image.fromarray(image) for image in pixels[..., ::-1].copy()]
    swapped = write_tar(tmp_path / "swapped.tar", turned, classes)
    done = flora("export", tmp_path / "dense", "--eval-data", right, "-o", tmp_path / "bundle", *QUICK)
    assert done.code == 0, done.message
    assert flora("verify", tmp_path / "bundle", "--data", right, "--threads", 1).code == 0
    outcome = flora("verify", tmp_path / "bundle", "--data", swapped, "--threads", 1)
    assert outcome.code == 3
    assert "dense, ONNX Runtime, batch 1: top1 is " in outcome.out
    assert "expected is 100.00" in outcome.out
    assert "order of channels" in outcome.out


def test_a_bundle_is_verified_where_torch_and_timm_cannot_be_imported(worked):
    args = ("verify", worked.bundle, "--data", worked.images, "--max-drop", 100, "--threads", 1, "--json")
    done = without_torch(*args)
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said["passed"]
    expected = {stage["name"]: stage["top1"] for stage in worked.manifest["verification"]["stages"]}
    for stage in said["report"]["stages"]:
        assert stage["images"] == 120
        if stage["name"] in expected:
            assert stage["top1"] == expected[stage["name"]]
    assert len(said["report"]["stages"]) == 4


def test_a_named_data_set_needs_torch_and_says_so(worked):
    args = ("verify", worked.bundle, "--data", "torch/fashion_mnist,root=x")
    done = without_torch(*args)
    assert done.returncode in (1, 4)
    assert done.stderr.startswith("flora: torch/fashion_mnist")
    assert "not installed" in done.stderr
