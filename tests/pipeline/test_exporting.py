"""Exports: the gate of low rank, profiles of batches, references, and what is refused before anything is built."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from export.images import LabelledImages
from tests.fake_gpu import FakeGpu, fake_tensorrt, install
from tests.flora_command import assert_nothing_at, assert_refused, flora, leftovers
from tests.samples import GREY
from tests.worked_example import QUICK, write_tar


def export(model: Path, images: object, out: Path, *more: object):
    return flora("export", model, "--eval-data", images, "-o", out, *QUICK, *more)


def test_low_rank_that_costs_too_much_fails_the_gate_and_names_the_stage(worked):
    bundle = worked.failed_bundle
    outcome = worked.outcomes["failed"]
    assert outcome.code == 3
    assert "The gate failed at factorized, torch" in outcome.message
    assert (bundle / "manifest.json").is_file()
    assert leftovers(worked.root) == []


def test_a_failed_export_prints_the_manifest_that_it_wrote(worked):
    bundle = worked.failed_bundle
    assert json.loads(worked.outcomes["failed"].out) == json.loads((bundle / "manifest.json").read_text())


def test_an_artefact_that_failed_is_labelled_and_not_recommended(worked):
    manifest = json.loads((worked.failed_bundle / "manifest.json").read_text())
    entries = {entry["name"]: entry for entry in manifest["artifacts"]}
    failed = entries["factorized, ONNX Runtime"]
    assert failed["status"] == "failed"
    assert failed["reason"].startswith("factorized, torch: drop is ")
    assert entries["dense, ONNX Runtime"]["status"] == "verified"
    assert manifest["recommended"] == "dense, ONNX Runtime"
    stages = {stage["name"]: stage for stage in manifest["verification"]["stages"]}
    assert [name for name, stage in stages.items() if not stage["passed"]] == ["factorized, torch"]
    assert stages["factorized, torch"]["drop"] > 1


def test_the_images_that_low_rank_sees_otherwise_lie_in_the_bundle_under_their_names(worked):
    stages = {stage["name"]: stage for stage in worked.manifest["verification"]["stages"]}
    lowrank = stages["factorized, torch"]
    assert 0 < lowrank["drop_low"] < lowrank["drop"] < lowrank["drop_high"]
    assert lowrank["p_value"] < 0.05
    assert len(lowrank["worst"]) == 5
    names = LabelledImages(str(worked.images), GREY).names()
    for image in lowrank["worst"]:
        assert image["name"] == names[image["index"]]
        assert image["label"] == image["expected"] == int(image["name"].partition("/")[0])
        assert image["file"] in worked.manifest["files"]
    kept = {name for name in worked.manifest["files"] if name.startswith("worst/")}
    assert kept == {image["file"] for stage in stages.values() for image in stage["worst"]}


def test_a_passed_and_a_failed_export_hold_the_same_model(worked):
    passed, failed = worked.manifest, json.loads((worked.failed_bundle / "manifest.json").read_text())
    assert passed["files"]["model/model.safetensors"] == failed["files"]["model/model.safetensors"]
    assert passed["artifacts"][1]["macs"] == failed["artifacts"][1]["macs"] < passed["artifacts"][0]["macs"]


def test_a_dense_model_that_is_less_right_than_it_is_known_to_be_fails_at_once(worked, tmp_path):
    """The images lie under classes of another order, which no comparison of two stages can show."""
    pixels = LabelledImages(str(worked.images), GREY)
    classes = [(int(label) + 1) % 10 for label in pixels.labels()]
    turned = write_tar(tmp_path / "turned.tar", [pixels[i][0] for i in range(len(pixels))], classes)
    expecting = ("--expect-top1", 100, "--max-drop", 2)
    outcome = export(worked.compact, turned, tmp_path / "bundle", *expecting)
    assert outcome.code == 3
    assert "dense, torch: top1 is 0.00 on these images, expected is 100.00. Look at how" in outcome.out
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["recommended"] is None
    assert manifest["recommendation_reason"] == "dense, torch, which all is compared with, fails by itself"
    right = export(worked.dense, worked.images, tmp_path / "right", *expecting)
    assert right.code == 0, right


def test_pictures_stay_out_of_the_bundle_where_they_are_not_wanted(worked, tmp_path):
    outcome = export(worked.compact, worked.images, tmp_path / "bundle", "--max-drop", 100, "--no-pictures")
    assert outcome.code == 0, outcome
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert not [name for name in manifest["files"] if name.startswith("worst/")]
    worst = [image for stage in manifest["verification"]["stages"] for image in stage["worst"]]
    assert worst
    assert {image["file"] for image in worst} == {None}


def test_a_precision_has_the_drop_of_the_table_unless_another_is_given(worked, dense_export):
    limits = json.loads((dense_export[0] / "manifest.json").read_text())["thresholds"]
    assert (limits["lowrank"]["max_drop"], limits["fp16"]["max_drop"]) == (1.0, 0.5)
    assert worked.manifest["thresholds"]["fp16"]["max_drop"] == 100


@pytest.fixture(scope="module")
def dense_export(worked, tmp_path_factory):
    """The dense model, exported on one image with batches other than the usual ones."""
    out = tmp_path_factory.mktemp("dense") / "bundle"
    return out, export(worked.dense, f"{worked.images},limit=1", out, "--batch", "2,5,7", "--json")


def test_one_image_and_another_batch_profile_are_enough(worked, dense_export):
    bundle, outcome = dense_export
    assert (outcome.code, outcome.err.strip()) == (0, "")
    manifest = json.loads(outcome.out)
    stages = manifest["verification"]["stages"]
    assert [stage["batch_size"] for stage in stages[1:]] == [2, 5]
    assert {stage["images"] for stage in stages} == {1}
    assert {latency["batch_size"] for latency in manifest["latency"].values()} == {5}
    assert manifest["image_sets"]["evaluation"]["images"] == 1
    checked = flora("verify", bundle, "--data", f"{worked.images},limit=1", "--threads", 1)
    assert checked.code == 0, checked


def test_the_bundle_of_a_dense_model_does_not_talk_of_low_rank(dense_export):
    """There is nothing to hold it against, and no reference is missing."""
    notes = json.loads(dense_export[1].out)["notes"]
    assert [note for note in notes if not note.startswith("The device was too busy")] == []


def test_a_compact_model_without_its_reference_is_exported_with_a_note(worked, tmp_path):
    compact = tmp_path / "compact"
    shutil.copytree(worked.compact, compact)
    config = json.loads((compact / "config.json").read_text())
    config["reference"]["path"] = str(tmp_path / "gone.safetensors")
    (compact / "config.json").write_text(json.dumps(config))
    outcome = export(compact, f"{worked.images},limit=2", tmp_path / "bundle")
    assert outcome.code == 0, outcome
    assert "Note: The dense reference was not found" in outcome.out
    assert "Name it with --reference" in outcome.out


def test_a_set_without_digests_is_noted_as_not_compared_with_the_evaluation_images(worked, tmp_path):
    compact = shutil.copytree(worked.compact, tmp_path / "compact")
    config = json.loads((compact / "config.json").read_text())
    assert "calibration" in config["image_sets"]
    config["image_sets"]["training"] = {"spec": "train/", "images": 128_000, "digest": None, "image_digests": None}
    (compact / "config.json").write_text(json.dumps(config))
    outcome = export(compact, f"{worked.images},limit=2", tmp_path / "bundle", "--max-drop", 100)
    assert outcome.code == 0, outcome
    notes = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["notes"]
    (note,) = [note for note in notes if note.startswith("Without the digests")]
    assert note.endswith("it was not checked whether evaluation images are among the training images (train/).")
    assert "Note: Without the digests" in outcome.out


def test_a_supernet_needs_ranks(worked, tmp_path):
    outcome = export(worked.supernet, worked.images, tmp_path / "bundle")
    assert_refused(outcome, "is a supernet folder", "--ranks FILE")
    assert_nothing_at(tmp_path / "bundle")


def test_ranks_do_not_apply_to_a_compact_model(worked, tmp_path):
    outcome = export(worked.compact, worked.images, tmp_path / "bundle", "--ranks", worked.ranks)
    assert_refused(outcome, "--ranks cuts a supernet folder")
    assert_nothing_at(tmp_path / "bundle")


def test_images_of_the_calibration_are_refused_as_evaluation_images(worked, tmp_path):
    outcome = export(worked.compact, worked.calibration, tmp_path / "bundle")
    assert_refused(outcome, "64 images of the evaluation set", "calibration set", "Use separate images")
    assert_nothing_at(tmp_path / "bundle")


def test_tensorrt_without_its_package_exits_4_before_anything_is_written(worked, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    outcome = export(worked.compact, worked.images, tmp_path / "bundle", "--to", "onnx,tensorrt")
    assert_refused(outcome, "tensorrt is not installed", "pip install 'flora-vit[gpu]'", code=4)
    assert_nothing_at(tmp_path / "bundle")


def test_tensorrt_without_a_gpu_exits_4_before_anything_is_written(worked, tmp_path, monkeypatch):
    gpu = FakeGpu()
    gpu.is_there = False
    install(monkeypatch, gpu, fake_tensorrt(lambda plan: None))
    outcome = export(worked.compact, worked.images, tmp_path / "bundle", "--to", "onnx,tensorrt")
    assert_refused(outcome, "An engine of tensorrt needs the NVIDIA GPU", code=4)
    assert_nothing_at(tmp_path / "bundle")


def test_compute_capabilities_apply_to_tensorrt_rtx_alone(worked, tmp_path):
    outcome = export(worked.compact, worked.images, tmp_path / "bundle", "--compute-capabilities", "sm86")
    assert_refused(outcome, "tensorrt-rtx only")
    assert_nothing_at(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--profile", "1,1,1"), "for engines, and none is among the targets"),
        (("--to", "tensorrt-rtx", "--builder-level", 4), "for tensorrt only"),
        (("--to", "tensorrt-rtx", "--hardware-compatible", "ampere-plus"), "name the GPUs as compute capabilities"),
        (("--to", "tensorrt-rtx", "--version-compatible"), "the version that built them alone"),
        (("--to", "tensorrt-rtx", "--profile", "1,8,64"), "given twice: 1/8/64 and 1/8/64"),
    ],
)
def test_what_no_engine_asked_for_takes_is_refused(worked, tmp_path, options, said):
    pytest.importorskip("tensorrt_rtx")
    assert_refused(export(worked.compact, worked.images, tmp_path / "bundle", *options), said)
    assert_nothing_at(tmp_path / "bundle")


@pytest.mark.parametrize("missing", ["--eval-data", "--out"])
def test_images_and_a_folder_to_write_are_needed(worked, tmp_path, missing):
    given = {"--eval-data": worked.images, "--out": tmp_path / "bundle"}
    del given[missing]
    outcome = flora("export", worked.compact, *(word for pair in given.items() for word in pair))
    assert outcome.code == 2
    assert missing in outcome.message
    assert_nothing_at(tmp_path / "bundle")


def test_an_unknown_compute_capability_is_refused(worked, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    outcome = export(
        *(worked.compact, worked.images, tmp_path / "bundle"),
        *("--to", "tensorrt-rtx", "--compute-capabilities", "sm10"),
    )
    assert_refused(outcome, "sm10", "sm86")
    assert_nothing_at(tmp_path / "bundle")


def test_an_opset_that_is_not_supported_is_refused_with_the_range(worked, tmp_path):
    outcome = export(worked.compact, worked.images, tmp_path / "bundle", "--opset", 12)
    assert_refused(outcome, "Opset 12", "17 to 25")
    assert_nothing_at(tmp_path / "bundle")


def test_a_reference_that_is_missing_or_of_another_model_is_refused(worked, tmp_path):
    missing = export(worked.compact, worked.images, tmp_path / "bundle", "--reference", tmp_path / "none.pth")
    assert_refused(missing, "none.pth is no dense reference")
    factorized = export(worked.compact, worked.images, tmp_path / "bundle", "--reference", worked.compact)
    assert_refused(factorized, "does not fit the model", "missing: blocks.0.attn.qkv.weight")
    assert_nothing_at(tmp_path / "bundle")


def test_a_reference_that_has_changed_is_refused(worked, tmp_path):
    compact = tmp_path / "compact"
    shutil.copytree(worked.compact, compact)
    config = json.loads((compact / "config.json").read_text())
    config["reference"]["sha256"] = "0" * 64
    (compact / "config.json").write_text(json.dumps(config))
    assert_refused(export(compact, worked.images, tmp_path / "bundle"), "has changed since", "--reference")
    assert_nothing_at(tmp_path / "bundle")


def test_a_dense_model_with_a_reference_is_refused_in_words_of_the_user(worked, tmp_path):
    outcome = export(worked.dense, f"{worked.images},limit=1", tmp_path / "bundle", "--reference", worked.dense)
    assert_refused(outcome, "--reference")
    assert_nothing_at(tmp_path / "bundle")
