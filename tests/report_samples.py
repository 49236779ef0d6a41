"""A bundle that has all that a report can show, made of facts alone: nothing in it was run."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from export.attestation import Attestation
from export.benchmark import LatencyStats
from export.bundle import (
    MANIFEST,
    ArtifactEntry,
    Bundle,
    EngineRecord,
    LayerEntry,
    Manifest,
    PartCost,
    QuantizationRecord,
    hash_files,
    load_bundle,
)
from export.verify import StageReport, VerifyReport, WorstImage
from flora.imagesets import ImageSetRecord
from tests.samples import GREY

HOSTILE = "</script><script>alert('1')</script><img src=https://example.org/x.png>"
ARTIFACTS: dict[str, dict[str, Any]] = {
    "dense, ONNX Runtime": {"path": "onnx/dense-fp32.onnx", "role": "yardstick", "macs": 138_620_000},
    "factorized, ONNX Runtime": {"path": "onnx/model-fp32.onnx", "role": "candidate", "macs": 54_870_000},
    "factorized int8, ONNX Runtime": {
        "path": "onnx/model-int8.onnx",
        "role": "candidate",
        "precision": "int8",
        "macs": 54_870_000,
        "quantization": QuantizationRecord(
            images=128,
            method="entropy",
            basis="rotated",
            trials={"entropy, rotated basis, 8-bit weights": 31.6},
            high={"head": "INT8 is not faster there"},
        ),
        "attestation": Attestation(
            source="profile of ONNX Runtime",
            weighted_by="time",
            shares={"int8": 0.875, "fp32": 0.125},
            products={"int8": 21, "fp32": 3},
            conversion_share=0.0625,
        ),
    },
    "factorized fp16, ONNX Runtime": {
        "path": "onnx/model-fp16.onnx",
        "role": "candidate",
        "precision": "fp16",
        "macs": 54_870_000,
        "status": "failed",
        "reason": "factorized fp16, ONNX Runtime, batch 8: kl is 0.2, above 0.005",
    },
    "tensorrt-rtx fp32": {
        "path": "engines/model-fp32.engine",
        "role": "candidate",
        "kind": "engine",
        "status": "built, not run",
        "spec": EngineRecord(
            source="onnx/model-fp32.onnx",
            build_seconds=2.5,
            backend="tensorrt-rtx",
            backend_version="1.7",
            min_batch=1,
            opt_batch=8,
            max_batch=64,
            compute_capabilities=("sm89",),
        ),
    },
}


def rich_bundle(folder: Path, **changes: Any) -> Bundle:
    """Write the bundle; `changes` are fields of its manifest."""
    for name, facts in ARTIFACTS.items():
        (folder / facts["path"]).parent.mkdir(parents=True, exist_ok=True)
        (folder / facts["path"]).write_bytes(name.encode())
    (folder / "worst").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"worst/{number}.png")
    files = hash_files(folder)
    facts = {
        "model": "vit_tiny_patch16_224",
        "class_names": [f"class <{number}>" for number in range(10)],
        "preprocessing": GREY,
        "files": files,
        "artifacts": [_entry(name, files) for name in ARTIFACTS],
        "layers": _layers(),
        "recommended": "factorized int8, ONNX Runtime",
        "recommendation_reason": "it passed every gate and takes 0.25 of the dense model's time",
        "verification": VerifyReport(stages=_stages()),
        "selection": VerifyReport(stages=[_stage("factorized fp16, ONNX Runtime, batch 8", "fp16", top1=84.0)]),
        "latency": {
            "dense, ONNX Runtime": _latency(100.5, 1.0),
            "factorized, ONNX Runtime": _latency(50.25, 0.5),
            "factorized int8, ONNX Runtime": _latency(25.125, 0.25),
        },
        "image_sets": {"evaluation": ImageSetRecord.of("val/", 2, ["aa", "bb"])},
        "versions": {"python": "3.11.7", "onnxruntime": "1.32.0"},
        "device": {"cpu": "a processor", "cores": "2", "threads": "1"},
        "command": ["flora", "export", "compact", "-o", HOSTILE],
        "created": "2026-11-28T02:00:00+00:00",
        "notes": [HOSTILE],
    }
    Manifest(**facts | changes).save(folder / MANIFEST)
    return load_bundle(folder)


def _entry(name: str, files: dict[str, str]) -> ArtifactEntry:
    facts = {"kind": "onnx", "precision": "fp32", "status": "verified", "params": 1_234_567} | ARTIFACTS[name]
    if facts["precision"] == "fp32" and facts["kind"] == "onnx":
        rest = facts["macs"] - 5_760_000
        facts["parts"] = {
            "LayerNorm": PartCost(macs=0, time_share=0.125),
            "attention": PartCost(macs=5_760_000, time_share=0.25),
            "fc1": PartCost(macs=rest, time_share=0.625),
        }
    return ArtifactEntry(name=name, sha256=files[facts["path"]], size_bytes=1_234_567, **facts)


def _layers() -> list[LayerEntry]:
    shapes = {"attn.qkv": (192, 576), "attn.proj": (192, 192), "mlp.fc1": (192, 768), "mlp.fc2": (768, 192)}
    return [
        LayerEntry(
            name=f"blocks.{block}.{name}",
            in_features=wide,
            out_features=high,
            tokens=50,
            rank="dense" if block and name == "attn.proj" else 24,
            is_pivoted=name == "mlp.fc1",
            macs=50 * 24 * (wide + high),
            dense_macs=50 * wide * high,
            sensitivity=1e-6 * (1 + place) ** (3 * block),
            probe_rank=24,
        )
        for block in range(2)
        for place, (name, (wide, high)) in enumerate(shapes.items())
    ]


def _stages() -> list[StageReport]:
    worst = [
        WorstImage(index=3, name="shirt/3.png", label=6, predicted=4, expected=6, kl=1.25, file="worst/0.png"),
        WorstImage(index=7, name=f"{HOSTILE}.png", predicted=2, expected=0, kl=0.75, file="worst/1.png"),
        WorstImage(index=9, name="gone.png", predicted=2, expected=0, kl=0.5),
    ]
    return [
        _stage("dense, torch", "lowrank"),
        _stage("dense, ONNX Runtime, batch 8", "fp32", "dense, torch"),
        _stage("factorized, torch", "lowrank", "dense, torch", drop=0.25, drop_low=-0.5, drop_high=1.0, p_value=0.625),
        _stage("factorized, ONNX Runtime, batch 8", "fp32", "factorized, torch", worst=worst),
        _stage(
            "factorized int8, ONNX Runtime, batch 8",
            "int8",
            "factorized, ONNX Runtime, batch 8",
            notes=["a note"],
        ),
        _stage(
            "factorized fp16, ONNX Runtime, batch 8",
            "fp16",
            "factorized, ONNX Runtime, batch 8",
            failures=["kl is 0.2, above 0.005"],
        ),
        _stage("factorized int8, ONNX Runtime, batch 1, against the first", "lowrank", "dense, torch", drop=0.5),
    ]


def _stage(name: str, kind: str, compared_with: str | None = None, **figures: Any) -> StageReport:
    facts = {"top1": 89.125, "top1_standard_error": 1.0, "top5": 99.5, "failures": []}
    if compared_with:
        facts |= {"agreement": 0.9875, "cosine": 0.99975, "max_relative": 6.5e-7, "kl": 0.00117, "drop": 0.0}
    facts |= figures
    return StageReport(
        name=name,
        kind=kind,
        compared_with=compared_with,
        provider="CPUExecutionProvider",
        batch_size=8,
        images=800,
        passed=not facts["failures"],
        **facts,
    )


def _latency(median_ms: float, ratio: float) -> LatencyStats:
    return LatencyStats(
        median_ms=median_ms,
        p90_ms=1.5 * median_ms,
        p99_ms=None,
        spread=0.03125,
        images_per_s=8000 / median_ms,
        ratio=ratio,
        ratio_interval=(0.9375 * ratio, 1.0625 * ratio),
        repeats=20,
        batch_size=8,
    )
