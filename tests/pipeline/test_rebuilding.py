"""`flora export BUNDLE --rebuild-engine` gives the bundle new engines, whole, or leaves it as it was."""

import json
import shutil
from pathlib import Path

import pytest

from export.bundle import hash_files, load_bundle
from tests.flora_command import assert_refused, flora, leftovers
from tests.worked_example import QUICK

ENGINE = "engines/model-fp32-tensorrt-rtx.engine"
pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def exported(worked, tmp_path_factory) -> Path:
    """A bundle with an engine of two profiles."""
    folder = tmp_path_factory.mktemp("rebuilding") / "bundle"
    options = ("--to", "tensorrt-rtx", "--compute-capabilities", "sm89", "--batch", "1,4,8", "--profile", "1,1,1")
    outcome = flora(
        *("export", worked.compact, "--eval-data", worked.images, "-o", folder, "--max-drop", 100),
        *(*QUICK, *options, "--workspace", 1024),
    )
    assert outcome.code == 0, outcome
    return folder


@pytest.fixture
def bundle(exported, tmp_path) -> Path:
    return shutil.copytree(exported, tmp_path / "bundle")


def engine_of(bundle: Path):
    (entry,) = (entry for entry in load_bundle(bundle).manifest.artifacts if entry.kind == "engine")
    return entry


def test_where_time_goes_on_a_processor_is_not_said_of_an_engine(exported):
    manifest = load_bundle(exported).manifest
    assert manifest.artifact("factorized, ONNX Runtime").parts
    assert not engine_of(exported).parts


def test_the_manifest_says_how_the_engine_was_built(exported):
    record = engine_of(exported).spec
    assert record.profiles == ((1, 4, 8), (1, 1, 1))
    assert (record.workspace_mib, record.compute_capabilities) == (1024, ("sm89",))
    assert (record.source, record.gpu, record.timing_cache) == ("onnx/model-fp32.onnx", None, False)
    assert record.build_seconds > 0


def test_engines_are_built_as_they_were_and_all_else_stays(bundle):
    (bundle / ENGINE).write_bytes(b"damaged")
    before, files = load_bundle(bundle).manifest, hash_files(bundle)
    outcome = flora("export", bundle, "--rebuild-engine")
    assert outcome.code == 0, outcome
    assert "1/4/8 and 1/1/1" in outcome.out
    assert f"Next: flora verify {bundle}" in outcome.out
    after, changed = load_bundle(bundle).manifest, hash_files(bundle)
    assert {name for name in files if files[name] != changed[name]} == {ENGINE, "report.html"}
    assert (bundle / ENGINE).stat().st_size == engine_of(bundle).size_bytes > 100_000
    assert engine_of(bundle).status == "built, not run"
    assert engine_of(bundle).spec.spec == before.artifact("factorized, tensorrt-rtx").spec.spec
    for name in ("recommended", "verification", "latency", "image_sets", "command", "created"):
        assert getattr(after, name) == getattr(before, name)
    assert after.notes[:-1] == before.notes
    assert after.notes[-1].startswith("Engines were rebuilt at ")
    assert flora("verify", bundle, "--threads", 1).code == 0
    assert leftovers(bundle.parent) == []


def test_what_is_given_takes_the_place_of_what_was(bundle):
    options = ("--batch", "2,2,4", "--profile", "1,1,2", "--compute-capabilities", "sm86,sm120", "--workspace", 512)
    outcome = flora("export", bundle, "--rebuild-engine", *options, "--json")
    assert outcome.code == 0, outcome
    (engine,) = json.loads(outcome.out)["engines"]
    record = engine_of(bundle).spec
    assert engine == json.loads(engine_of(bundle).model_dump_json())
    assert record.profiles == ((2, 2, 4), (1, 1, 2))
    assert (record.workspace_mib, record.compute_capabilities) == (512, ("sm86", "sm120"))


def test_a_build_that_fails_leaves_the_bundle_as_it_was(bundle):
    before = hash_files(bundle), (bundle / "manifest.json").read_bytes()
    outcome = flora("export", bundle, "--rebuild-engine", "--workspace", 1)
    assert_refused(outcome, "The workspace of 1 MiB is too small")
    assert (hash_files(bundle), (bundle / "manifest.json").read_bytes()) == before
    assert leftovers(bundle.parent) == []


def test_an_altered_onnx_file_is_no_source_of_an_engine(bundle):
    with (bundle / "onnx" / "model-fp32.onnx").open("ab") as file:
        file.write(b"x")
    before = hash_files(bundle)
    assert_refused(flora("export", bundle, "--rebuild-engine"), "model-fp32.onnx was altered", "Nothing", code=3)
    assert hash_files(bundle) == before


def test_a_truncated_engine_is_called_so_with_what_to_type(bundle):
    content = (bundle / ENGINE).read_bytes()
    (bundle / ENGINE).write_bytes(content[:1000])
    outcome = flora("verify", bundle)
    said = f"{ENGINE} is truncated, 1,000 of {len(content):,} bytes"
    assert_refused(outcome, said, f"flora export {bundle} --rebuild-engine builds it anew", code=3)


def test_a_bundle_without_engines_says_how_to_get_one(worked):
    outcome = flora("export", worked.bundle, "--rebuild-engine")
    assert_refused(outcome, "holds no engines to rebuild", "--to tensorrt")


@pytest.mark.parametrize("options", [("--builder-level", 2), ("--hardware-compatible", "ampere-plus")])
def test_what_tensorrt_alone_takes_is_refused_for_another_engine(bundle, options):
    assert_refused(flora("export", bundle, "--rebuild-engine", *options), "for tensorrt only")


def test_options_of_an_export_are_not_for_rebuilding(bundle):
    outcome = flora("export", bundle, "--rebuild-engine", "--opset", 20, "--eval-data", "x")
    assert outcome.code == 2
    assert "leave out --eval-data, --opset" in outcome.message


def test_it_needs_no_torch(bundle):
    from tests.pipeline.test_verifying import without_torch

    outcome = without_torch("export", bundle, "--rebuild-engine")
    assert outcome.returncode == 0, outcome.stderr
