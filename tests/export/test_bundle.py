"""A bundle that was changed, in any file, is told from one that was not; its manifest refuses what cannot be true."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from export_samples import GREY, random_images
from onnx import numpy_helper
from safetensors.numpy import save_file

from export.benchmark import LatencyStats
from export.bundle import (
    GOLDEN,
    MANIFEST,
    ArtifactEntry,
    Bundle,
    EngineRecord,
    Manifest,
    check_golden,
    check_hashes,
    hash_files,
    load_bundle,
    read_golden,
    write_golden,
)
from export.runners import OnnxRunner
from export.torch_runner import TorchRunner
from flora.errors import InputError
from flora.imagesets import ImageSetRecord


@pytest.fixture
def bundle(tmp_path: Path, onnx_file: Path, model) -> Bundle:
    folder = tmp_path / "bundle"
    (folder / "model").mkdir(parents=True)
    (folder / "model/config.json").write_text("{}")
    (folder / "model.onnx").write_bytes(onnx_file.read_bytes())
    with TorchRunner(model, name="torch") as runner:
        write_golden(folder / GOLDEN, random_images(4), {"model.onnx": runner(random_images(4))})
    files = hash_files(folder)
    _manifest(files, size_bytes=(folder / "model.onnx").stat().st_size).save(folder / MANIFEST)
    return load_bundle(folder)


def _manifest(files: dict[str, str], **entry) -> Manifest:
    onnx_entry = {
        "name": "onnx fp32",
        "path": "model.onnx",
        "kind": "onnx",
        "precision": "fp32",
        "role": "yardstick",
        "status": "verified",
        "sha256": files["model.onnx"],
        "size_bytes": 1,
    }
    return Manifest(
        model="vit",
        preprocessing=GREY,
        files=files,
        artifacts=[ArtifactEntry(**(onnx_entry | entry))],
        recommended="onnx fp32",
        latency={"onnx fp32": LatencyStats.of(np.ones(30), np.ones(30), batch_size=4)},
        image_sets={"evaluation": ImageSetRecord.of("images", 2, ["aa", "bb"])},
        created="2026-11-22T22:00:00+00:00",
    )


def test_what_was_written_is_read(bundle):
    assert Manifest.parse(bundle.manifest.to_json(), origin="here") == bundle.manifest
    assert sorted(bundle.manifest.files) == [GOLDEN, "model.onnx", "model/config.json"]
    assert bundle.path_of(bundle.manifest.artifact("onnx fp32")) == bundle.folder / "model.onnx"
    assert check_hashes(bundle) == []


def test_every_changed_file_is_named(bundle):
    content = bytearray((bundle.folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle.folder / "model.onnx").write_bytes(content)
    (bundle.folder / "model/config.json").unlink()
    (bundle.folder / "model/extra.txt").write_text("new")
    assert check_hashes(bundle) == [
        "model.onnx was altered",
        "model/config.json is missing",
        "model/extra.txt is not part of the bundle",
    ]


def test_golden_outputs_tell_the_right_file_from_a_wrong_one(bundle):
    entry = bundle.manifest.artifact("onnx fp32")
    with OnnxRunner(bundle.path_of(entry), threads=1) as runner:
        assert check_golden(bundle, entry, runner) == []
    file = onnx.load(bundle.path_of(entry))
    weight = next(tensor for tensor in file.graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) > 100)
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    onnx.save(file, bundle.path_of(entry))
    with OnnxRunner(bundle.path_of(entry), threads=1) as runner:
        problems = check_golden(bundle, entry, runner)
    assert any(line.startswith("onnx fp32: against golden logits max_relative is") for line in problems)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda x: x * np.nan, "not finite"), (lambda x: x[:, :3], r"shape \[4, 3\], golden are \[4, 10\]")],
)
def test_golden_outputs_of_another_kind_are_named(bundle, change, message):
    logits = read_golden(bundle.folder / GOLDEN)[1]["model.onnx"]
    problems = check_golden(bundle, bundle.manifest.artifacts[0], lambda images: change(logits))
    assert len(problems) == 1
    assert re.search(message, problems[0])


def test_golden_round_trip_and_refusals(tmp_path):
    path = tmp_path / GOLDEN
    write_golden(path, random_images(3)[:, :, ::2], {"onnx/a.onnx": np.ones((3, 10)), "b": np.zeros((3, 2))})
    images, logits = read_golden(path)
    assert np.array_equal(images, random_images(3)[:, :, ::2])
    assert {name: (values.dtype, values.shape) for name, values in logits.items()} == {
        "onnx/a.onnx": (np.float32, (3, 10)),
        "b": (np.float32, (3, 2)),
    }
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="no complete safetensors"):
        read_golden(path)
    save_file({"weight": np.ones(3)}, path)
    with pytest.raises(InputError, match="no golden images and logits but weight"):
        read_golden(path)
    with pytest.raises(InputError, match="does not exist"):
        read_golden(tmp_path / "none")
    with pytest.raises(InputError, match="got 3 images and logits for 2"):
        write_golden(path, random_images(3), {"a": np.ones((2, 10))})


def test_an_artefact_without_golden_logits_is_named(bundle):
    write_golden(bundle.folder / GOLDEN, random_images(4), {"other.onnx": np.ones((4, 10))})
    assert check_golden(bundle, bundle.manifest.artifacts[0], lambda images: images) == [
        "onnx fp32: golden.safetensors has no logits of model.onnx"
    ]


def test_a_folder_without_manifest_is_no_bundle(tmp_path):
    with pytest.raises(InputError, match=r"no bundle: it holds no manifest\.json"):
        load_bundle(tmp_path)


def test_a_truncated_manifest_is_refused(bundle):
    path = bundle.folder / MANIFEST
    path.write_text(path.read_text()[:-40])
    with pytest.raises(InputError, match=r"manifest\.json is not a valid Manifest"):
        load_bundle(bundle.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m["artifacts"][0].update(colour="red"), r"artifacts\.0\.colour"),
        (lambda m: m.update(schema_version=2), "schema_version"),
        (lambda m: m["artifacts"][0].update(status="built, not run"), "not verified"),
        (lambda m: m["artifacts"][0].update(status="fine"), r"artifacts\.0\.status"),
        (lambda m: m["artifacts"][0].update(path="../model.onnx"), "leads out of the bundle"),
        (lambda m: m["artifacts"][0].update(sha256="0" * 64), "same SHA-256"),
        (lambda m: m["artifacts"][0].update(kind="engine"), "has a spec"),
        (lambda m: m["artifacts"].append(m["artifacts"][0]), "names must differ"),
        (lambda m: m.update(recommended="other"), "recommended is other"),
        (lambda m: m.pop("files"), "files: Field required"),
    ],
)
def test_a_manifest_that_cannot_be_true_is_refused(bundle, change, message):
    path = bundle.folder / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        load_bundle(bundle.folder)


def test_an_unknown_artefact_is_answered_with_the_known(bundle):
    with pytest.raises(InputError, match=r"only onnx fp32\. Did you mean onnx fp32"):
        bundle.manifest.artifact("onnx fp16")


def test_an_engine_entry_needs_its_spec():
    record = EngineRecord(
        backend="tensorrt-rtx",
        backend_version="1.7",
        min_batch=1,
        opt_batch=8,
        max_batch=64,
        compute_capabilities=("sm89",),
        source="onnx/model-fp32.onnx",
        build_seconds=2.5,
    )
    entry = {"name": "e", "path": "e.engine", "precision": "fp32", "role": "candidate", "status": "built, not run"}
    assert ArtifactEntry(**entry, kind="engine", sha256="0", size_bytes=1, spec=record).spec == record
    with pytest.raises(ValueError, match="nothing else, has a spec"):
        ArtifactEntry(**entry, kind="onnx", sha256="0", size_bytes=1, spec=record)
