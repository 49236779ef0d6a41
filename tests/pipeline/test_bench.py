"""`flora bench` times a bundle as it was exported: real runtimes, on a clock on which each file takes its time."""

import csv
import hashlib
import io
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.runners import OnnxRunner, OpenVinoRunner
from export.torch_runner import TorchRunner
from flora.pipeline.bench import _timed_rows
from flora.pipeline.bench_report import BenchReport
from flora.pipeline.bench_subjects import Subject
from tests.flora_command import Outcome, assert_nothing_at, assert_refused, flora
from tests.pipeline.test_verifying import without_torch

COMPACT = "onnx/model-fp32.onnx"
DENSE, FACTORIZED = "dense, ONNX Runtime", "factorized, ONNX Runtime"
# Milliseconds of one image, and of a batch besides.
MS = {"dense-fp32.onnx": (2.0, 4.0), "model-fp32.onnx": (1.0, 2.0)}
IN_TORCH = (3.0, 6.0)


class Device:
    """Runs files for real, on a clock on which each takes its milliseconds, times what `speeds` says in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 0
        self.speeds = itertools.repeat(1.0)
        monkeypatch.setattr(time, "perf_counter_ns", lambda: self.now_ns)
        for kind in (OnnxRunner, OpenVinoRunner, TorchRunner):
            monkeypatch.setattr(kind, "bind", self._timed(kind.bind))

    def _timed(self, bind: Callable) -> Callable:
        def bound(runner, images: np.ndarray) -> Callable[[], object]:
            real = bind(runner, images)
            image_ms, batch_ms = MS[runner.path.name] if hasattr(runner, "path") else IN_TORCH

            def run() -> None:
                real()
                self.now_ns += round(1e6 * (image_ms * len(images) + batch_ms) * next(self.speeds))

            return run

        return bound


@pytest.fixture
def device(monkeypatch) -> Device:
    return Device(monkeypatch)


def bench(bundle: Path, *args: object) -> Outcome:
    return flora("bench", bundle, "--no-memory", *args)


def change_manifest(bundle: Path, change: Callable[[dict], None]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_figures_are_those_of_the_clock(device, worked):
    outcome = bench(worked.bundle, "--batch", "4,1", "--json")
    assert outcome.code == 0, outcome
    report = BenchReport.parse(outcome.out, origin="stdout")
    assert [(row.name, row.latency.batch_size) for row in report.rows] == [
        (DENSE, 1),
        (FACTORIZED, 1),
        (DENSE, 4),
        (FACTORIZED, 4),
    ]
    first, second, third, fourth = (row.latency for row in report.rows)
    assert [one.median_ms for one in (first, second, third, fourth)] == [6, 3, 12, 6]
    assert (fourth.p90_ms, fourth.p99_ms, fourth.spread) == (6, 6, 0)
    assert [one.ratio for one in (first, second, third, fourth)] == [1, 0.5, 1, 0.5]
    assert fourth.ratio_interval == (0.5, 0.5)
    assert fourth.images_per_s == pytest.approx(4 / 0.006)
    assert fourth.repeats >= 100
    row = report.rows[-1]
    assert (row.provider, row.status, row.transfers, row.latency.steady) == (
        "CPUExecutionProvider",
        "verified",
        None,
        True,
    )
    assert (row.warm_up, row.memory, report.left_out) == (0, None, {})


def test_ratios_hold_while_all_drifts(device, worked):
    device.speeds = (1 + 0.3 * np.sin(turn / 400) for turn in itertools.count())
    report = BenchReport.parse(bench(worked.bundle, "--batch", 1, "--json").out, origin="stdout")
    dense, factorized = report.rows
    assert factorized.latency.ratio == pytest.approx(0.5, rel=0.01)
    assert factorized.latency.ratio_spread < 0.01
    assert dense.latency.p99_ms > 1.03 * dense.latency.median_ms


def test_a_warm_up_is_left_out_and_told(device, worked):
    device.speeds = itertools.chain((1 + 3 * 0.97**turn for turn in range(150)), itertools.repeat(1.0))
    report = BenchReport.parse(bench(worked.bundle, "--batch", 1, "--json").out, origin="stdout")
    assert all(10 < row.warm_up < 60 and row.latency.steady for row in report.rows)
    assert report.rows[0].latency.median_ms == pytest.approx(6, rel=0.02)


def test_a_device_that_is_too_busy_is_told_and_the_figures_are_kept(device, worked, tmp_path):
    device.speeds = itertools.cycle(np.random.default_rng(0).lognormal(0, 1.5, 997))
    outcome = bench(worked.bundle, "--batch", 1, "--seconds", 0.3, "-o", tmp_path / "bench.json")
    assert (outcome.code, "Traceback" in outcome.err) == (3, False)
    assert "too busy" in outcome.message
    assert "uncertain by" in outcome.message
    assert "UNCERTAIN" in outcome.out
    assert len(BenchReport.load(tmp_path / "bench.json").uncertain) >= 1


def test_json_and_csv_hold_what_is_printed(device, worked, tmp_path):
    outcome = bench(worked.bundle, "--batch", 1, "--json", "-o", tmp_path / "bench.json")
    report = BenchReport.load(tmp_path / "bench.json")
    assert BenchReport.parse(outcome.out, origin="stdout") == report
    assert report.protocol["threads"] == "1"
    assert report.device["cpu"]
    assert report.versions["onnxruntime"]
    report.write(tmp_path / "bench.csv")
    lines = list(csv.DictReader(io.StringIO((tmp_path / "bench.csv").read_text())))
    assert [line["name"] for line in lines] == [row.name for row in report.rows]
    for line, row in zip(lines, report.rows, strict=True):
        for field in ("median_ms", "p90_ms", "p99_ms", "images_per_s", "ratio", "repeats", "batch_size"):
            assert float(line[field]) == getattr(row.latency, field)
        assert (float(line["ratio_low"]), float(line["ratio_high"])) == row.latency.ratio_interval
        assert (line["status"], line["transfers"], line["peak_mib"]) == ("verified", "", "")
        assert line["threads"] == "1"


def test_the_table_prints_figures_and_the_whole_protocol(device, worked, tmp_path):
    outcome = bench(worked.bundle, "--batch", 4, "--artifact", COMPACT, "-o", tmp_path / "bench.csv")
    assert outcome.code == 0, outcome
    for words in (FACTORIZED, "666.7", "ran on CPUExecutionProvider", "threads: 1", "order: interleaved", "cpu: "):
        assert words in outcome.out
    assert f"Wrote {tmp_path / 'bench.csv'}" in outcome.out
    assert DENSE not in outcome.out


def test_other_runtimes_are_timed_beside_the_one_exported_for(device, worked):
    outcome = bench(worked.bundle, "--batch", 2, "--runtime", "torch", "--runtime", "openvino", "--json")
    assert outcome.code == 0, outcome
    rows = BenchReport.parse(outcome.out, origin="stdout").rows
    assert {(row.name, row.provider, row.artifact) for row in rows} == {
        (DENSE, "CPUExecutionProvider", DENSE),
        (FACTORIZED, "CPUExecutionProvider", FACTORIZED),
        ("dense, OpenVINO", "OpenVINO CPU, f32", DENSE),
        ("factorized, OpenVINO", "OpenVINO CPU, f32", FACTORIZED),
        ("factorized, torch", "torch cpu", "model"),
    }
    ratio = {row.name: row.latency.ratio for row in rows}
    assert (rows[0].name, ratio["factorized, OpenVINO"], ratio["factorized, torch"]) == (DENSE, 0.5, 1.5)


def test_on_a_gpu_each_is_timed_with_transfers_and_without(monkeypatch, tmp_path):
    """The GPU is not there, so a clock stands in for it."""
    now_ns = 0

    def takes(milliseconds: int) -> None:
        nonlocal now_ns
        now_ns += milliseconds * 1_000_000

    class OnGpu:
        provider = "CUDAExecutionProvider"

        def __init__(self, without: int, transfers: int) -> None:
            self.without, self.transfers = without, transfers

        def __call__(self, images: np.ndarray) -> None:
            takes(self.without + self.transfers)

        def bind(self, images: np.ndarray) -> Callable[[], object]:
            return lambda: takes(self.without)

    monkeypatch.setattr(time, "perf_counter_ns", lambda: now_ns)
    subject = Subject(
        name=FACTORIZED,
        artifact=FACTORIZED,
        runtime="ort-cuda",
        precision="fp32",
        status="verified",
        is_yardstick=False,
        path=tmp_path,
        threads=1,
        asked=False,
    )
    runners = [(subject, OnGpu(4, 6)), (subject, OnGpu(2, 6))]
    rows = _timed_rows(runners, np.zeros((4, 1, 28, 28), np.float32), seconds=10)
    assert [(row.transfers, row.latency.median_ms, row.latency.ratio) for row in rows] == [
        (False, 4, 1),
        (True, 10, 1),
        (False, 2, 0.5),
        (True, 8, 0.8),
    ]


def test_it_really_times_and_weighs_without_torch(worked):
    done = without_torch("bench", worked.bundle, "--batch", "1,8", "--seconds", 2, "--json")
    assert done.returncode in (0, 3), done.stderr  # 3: this device was too busy
    report = BenchReport.parse(done.stdout, origin="stdout")
    assert len(report.rows) == 4
    for row in report.rows:
        assert 0 < row.latency.median_ms < 1000
        assert 1 < row.memory.growth_mib < row.memory.peak_mib < 500
    assert report.rows[0].memory.peak_mib <= report.rows[2].memory.peak_mib


def test_a_bundle_with_an_altered_file_is_refused(bundle, never_run, tmp_path):
    content = bytearray((bundle / COMPACT).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / COMPACT).write_bytes(content)
    outcome = bench(bundle, "-o", tmp_path / "bench.json")
    assert outcome.code == 3
    assert f"{COMPACT} was altered. Nothing of it was run." in outcome.message
    assert_nothing_at(tmp_path / "bench.json")


def test_engines_that_nothing_here_runs_are_named_and_not_timed(device, bundle):
    (bundle / "engines").mkdir()
    (bundle / "engines" / "model.engine").write_bytes(b"an engine")
    digest = hashlib.sha256(b"an engine").hexdigest()
    spec = {"backend": "tensorrt-rtx", "backend_version": "1.7", "min_batch": 1, "opt_batch": 8, "max_batch": 64}
    spec |= {"source": COMPACT, "build_seconds": 1.5}

    def add_engine(manifest: dict) -> None:
        changes = {
            "name": "factorized, tensorrt-rtx",
            "path": "engines/model.engine",
            "kind": "engine",
            "status": "built, not run",
            "sha256": digest,
            "spec": {**spec, "compute_capabilities": ["sm89"]},
        }
        manifest["artifacts"].append(manifest["artifacts"][1] | changes)
        manifest["files"]["engines/model.engine"] = digest

    change_manifest(bundle, add_engine)
    report = BenchReport.parse(bench(bundle, "--batch", 1, "--json").out, origin="stdout")
    assert len(report.rows) == 2
    assert list(report.left_out) == ["factorized, tensorrt-rtx"]
    assert "nothing here runs engines of tensorrt-rtx" in report.left_out["factorized, tensorrt-rtx"]
    assert_refused(bench(bundle, "--artifact", "engines/model.engine"), "can be timed here", "tensorrt-rtx")


def test_a_batch_that_a_file_does_not_take_is_told_and_one_that_nothing_takes_refused(device, bundle):
    model = onnx.load(bundle / COMPACT)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, bundle / COMPACT)
    digest = hashlib.sha256((bundle / COMPACT).read_bytes()).hexdigest()

    def vouch(manifest: dict) -> None:
        manifest["files"][COMPACT] = digest
        for entry in manifest["artifacts"]:
            entry["sha256"] = digest if entry["path"] == COMPACT else entry["sha256"]

    change_manifest(bundle, vouch)
    report = BenchReport.parse(bench(bundle, "--batch", "2,3", "--json").out, origin="stdout")
    found = [(row.name, row.latency.batch_size) for row in report.rows]
    assert found == [(DENSE, 2), (FACTORIZED, 2), (DENSE, 3)]
    assert "of shape [2, 1, 28, 28]" in report.left_out[f"{FACTORIZED}, batch 3"]
    assert_refused(bench(bundle, "--batch", 3, "--artifact", COMPACT), "Nothing takes a batch of 3", "[2, 1, 28, 28]")


BAD = {
    "no such artefact": (["--artifact", "factorised, ONNX Runtime"], f"Did you mean {FACTORIZED}", 1),
    "no such runtime": (["--runtime", "opnvino"], "Did you mean openvino", 1),
    "engines by their runtime": (["--runtime", "tensorrt"], "runs neither ONNX files nor models", 1),
    "batch of none": (["--batch", "8,0"], "Batch sizes are at least 1", 1),
    "no time": (["--seconds", "0"], "more than 0", 1),
    "a report of another kind": (["-o", "bench.txt"], "ends with .json or .csv", 1),
    "a GPU that is not there": (["--runtime", "ort-cuda"], "CUDAExecutionProvider", 4),
}


@pytest.mark.parametrize(("args", "says", "code"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(worked, args, says, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(bench(worked.bundle, *args), says, code=code)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bundle_is_refused(worked, tmp_path):
    assert_refused(bench(tmp_path / "none"), "is no bundle")
    assert_refused(bench(worked.compact), "is no bundle")


def test_a_missing_runtime_is_refused_where_it_is_asked_for_and_where_nothing_else_runs(worked, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert_refused(bench(worked.bundle, "--runtime", "openvino"), "pip install 'flora-vit[openvino]'", code=4)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert_refused(bench(worked.bundle), "Nothing runs here", "pip install 'flora-vit[cpu]'", code=4)
