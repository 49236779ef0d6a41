"""`flora verify` runs the engines whose GPU is here, and says of the others why not.

The GPU is faked: an engine is what ONNX Runtime makes of the bytes of its file.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from export.device import Gpu
from export.engine_record import EngineRecord
from export.runners import OnnxRunner
from tests.fake_gpu import FakeEngine, FakeGpu, fake_tensorrt, install
from tests.flora_command import flora

NAME = "factorized, tensorrt"
PATH = "engines/model-fp32-tensorrt.engine"
A10 = Gpu(name="NVIDIA A10", compute_capability="sm86", cuda="13.0")


@pytest.fixture
def bundle(worked, tmp_path) -> Path:
    """A bundle whose model passes, with an engine of it."""
    folder = shutil.copytree(worked.bundle, tmp_path / "bundle")
    add_engine(folder, (folder / "onnx" / "model-fp32.onnx").read_bytes())
    return folder


def add_engine(folder: Path, content: bytes, **changes) -> None:
    """Let the bundle hold an engine of these bytes, built for batches of 2 to 4 by TensorRT 11.4 on an A10."""
    record = EngineRecord(
        source="onnx/model-fp32.onnx",
        backend="tensorrt",
        backend_version="11.4",
        compute_capabilities=(),
        build_seconds=1.0,
        gpu=A10,
        **({"min_batch": 2, "opt_batch": 3, "max_batch": 4} | changes),
    )
    file = folder / PATH
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    source = next(entry for entry in manifest["artifacts"] if entry["path"] == record.source)
    digest = hashlib.sha256(content).hexdigest()
    engine = {"name": NAME, "path": PATH, "kind": "engine", "status": "built, not run", "sha256": digest}
    engine |= {"size_bytes": len(content), "spec": record.model_dump(mode="json"), "certified": False}
    manifest["artifacts"] = [one for one in manifest["artifacts"] if one["kind"] != "engine"] + [source | engine]
    manifest["files"][PATH] = digest
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> FakeGpu:
    """An A10 with TensorRT 11.4, which opens what is an ONNX file."""
    gpu = FakeGpu()

    def opened(plan: bytes) -> FakeEngine | None:
        path = tmp_path / "plan.onnx"
        path.write_bytes(plan)
        if not plan.startswith(b"\x08"):
            return None
        runner = OnnxRunner(path, threads=1)
        size = tuple(runner._takes.shape[1:])
        classes = runner(np.zeros((1, *size), np.float32)).shape[1]
        return FakeEngine(runner, classes, [[(batch, *size) for batch in (2, 3, 4)]])

    install(monkeypatch, gpu, fake_tensorrt(opened, version="11.4"))
    return gpu


def verified(bundle: Path, *options: object) -> dict:
    return json.loads(flora("verify", bundle, "--threads", 1, *options, "--json").out)


def test_an_engine_that_computes_what_its_file_does_is_verified(bundle, gpu, worked):
    outcome = flora("verify", bundle, "--threads", 1)
    assert outcome.code == 0, outcome
    assert f"Ran here: {NAME}: verified." in outcome.out
    assert "Not run here" not in outcome.out
    found = verified(bundle, "--data", worked.images)
    assert (found["passed"], found["engines"], found["not_run"]) == (True, {NAME: "verified"}, [])
    stages = {stage["name"]: stage for stage in found["report"]["stages"] if stage["name"].startswith(NAME)}
    assert list(stages) == [f"{NAME}, batch 3", f"{NAME}, batch 2, against the first"]
    assert stages[f"{NAME}, batch 3"]["compared_with"] == "factorized, ONNX Runtime, batch 8"
    assert {stage["provider"] for stage in stages.values()} == {"TensorRT 11.4"}
    assert not gpu.memory


def test_an_engine_that_computes_something_else_fails(bundle, gpu, worked):
    add_engine(bundle, (bundle / "onnx" / "dense-fp32.onnx").read_bytes())
    outcome = flora("verify", bundle, "--threads", 1)
    assert outcome.code == 3
    assert f"{NAME}: against golden logits" in outcome.out
    assert f"Ran here: {NAME}: failed." in outcome.out
    found = verified(bundle, "--data", worked.images)
    assert (found["passed"], found["engines"]) == (False, {NAME: "failed"})


def test_an_engine_that_should_load_and_does_not_fails(bundle, gpu, worked):
    add_engine(bundle, b"something else")
    found = verified(bundle, "--data", worked.images)
    assert (found["passed"], found["engines"]) == (False, {NAME: "failed"})
    assert "does not load in tensorrt 11.4" in found["problems"][0]


def test_an_engine_of_another_gpu_is_not_run_and_said_to_be_built_anew(bundle, gpu):
    gpu.name = "NVIDIA L4"
    found = verified(bundle)
    assert (found["passed"], found["engines"]) == (True, {})
    (line,) = found["not_run"]
    assert line.startswith(f"{NAME}: built, not run; rebuild needed, because it was built on NVIDIA A10 (sm86)")
    assert line.endswith(f"run flora export {bundle} --rebuild-engine")


def test_an_engine_with_code_of_its_own_is_run_where_it_is_trusted_alone(bundle, gpu):
    add_engine(bundle, (bundle / "onnx" / "model-fp32.onnx").read_bytes(), version_compatible=True)
    found = verified(bundle)
    assert found["engines"] == {}
    assert "--trust-engines" in found["not_run"][0]
    assert verified(bundle, "--trust-engines")["engines"] == {NAME: "verified"}


def test_without_a_gpu_the_bundle_still_passes(bundle, gpu):
    gpu.is_there = False
    found = verified(bundle)
    assert (found["passed"], found["not_run"]) == (True, [f"{NAME}: built, not run; there is no NVIDIA GPU here"])
