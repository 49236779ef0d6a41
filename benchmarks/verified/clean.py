"""Exports of trained models with nothing wrong in them: neither `flora export` nor `flora verify` may fail one.

The commands as a user types them. Export sees every fourth test image, verify another fourth.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RUNS = ROOT / "runs" / "verification"
FASHION = ROOT / "examples" / "fashion" / "model"
ROAD = ROOT / "benchmarks" / "road"
GATE_FAILED = 3


@dataclass(frozen=True, kw_only=True)
class CleanExport:
    """A model folder, or the Fashion ViT at uniform ranks for so many percent of its MACs; options of the export."""

    model: Path
    macs: int | None = None
    dense: Path | None = None
    options: tuple[str, ...] = ()


def _road(name: str) -> dict[str, Path]:
    """A fine-tuned compact model of the benchmark `paper_road`, and the dense model that it came from."""
    return {"model": ROAD / "compact" / name, "dense": ROAD / "models" / name.rpartition("-")[0]}


INT8, FP16, OPENVINO = ("--precision", "int8"), ("--precision", "fp16"), ("--runtime", "openvino")
EXPORTS = {
    "fashion-dense": CleanExport(model=FASHION),
    **{f"fashion-{macs}": CleanExport(model=FASHION, macs=macs) for macs in (60, 50, 40, 30)},
    "fashion-40-opset-17": CleanExport(model=FASHION, macs=40, options=("--opset", "17")),
    "fashion-40-opset-23": CleanExport(model=FASHION, macs=40, options=("--opset", "23")),
    "fashion-40-batch": CleanExport(model=FASHION, macs=40, options=("--batch", "3,5,7")),
    "fashion-40-openvino": CleanExport(model=FASHION, macs=40, options=OPENVINO),
    "fashion-60-int8": CleanExport(model=FASHION, macs=60, options=INT8),
    "fashion-40-int8": CleanExport(model=FASHION, macs=40, options=INT8),
    "fashion-40-int8-openvino": CleanExport(model=FASHION, macs=40, options=(*INT8, *OPENVINO)),
    "fashion-40-fp16": CleanExport(model=FASHION, macs=40, options=FP16),
    "fashion7-dense": CleanExport(model=ROAD / "models" / "fashion7"),
    "fashion7-20": CleanExport(**_road("fashion7-20")),
    "fashion7-15": CleanExport(**_road("fashion7-15")),
    "fashion7-20-int8": CleanExport(**_road("fashion7-20"), options=INT8),
    "swin-dense": CleanExport(model=ROAD / "models" / "swin"),
    "swin-58": CleanExport(**_road("swin-58")),
    "swin-58-int8": CleanExport(**_road("swin-58"), options=INT8),
}


def measure_clean(name: str, fashion: str) -> dict[str, Any]:
    """What failed, if anything; `fashion` names the data set."""
    export = EXPORTS[name]
    with TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        done = flora(
            *("export", model_folder(export, fashion), "--eval-data", f"{fashion},split=validation,fold=1/4"),
            *(("--reference", export.dense) if export.dense else ()),
            *(("--calib-data", f"{fashion},split=train,fold=1/24") if "--precision" in export.options else ()),
            *(*export.options, "--repeats", 3, "--threads", 1, "-o", bundle, "--json"),
        )
        said = json.loads(done)
        again = json.loads(
            flora("verify", bundle, "--data", f"{fashion},split=validation,fold=2/4", "--threads", 1, "--json")
        )
    failed = [stage for stage in said["verification"]["stages"] if not stage["passed"]]
    failed += [stage for stage in again["report"]["stages"] if not stage["passed"]]
    return {
        "failures": [f"{stage['name']}: {line}" for stage in failed for line in stage["failures"]]
        + [f"{one['name']}: {one['reason']}" for one in said["artifacts"] if one["status"] == "failed"]
        + again["problems"],
        "stages": len(said["verification"]["stages"]) + len(again["report"]["stages"]),
        "largest_drop": max((stage["drop"] or 0.0) for stage in said["verification"]["stages"]),
        "certified": [one["name"] for one in said["artifacts"] if one["certified"]],
    }


def model_folder(export: CleanExport, fashion: str) -> Path:
    """The folder to export; one at uniform ranks is made once, from 512 of the images that training held out."""
    if export.macs is None:
        return export.model
    supernet, compact = RUNS / "supernet", RUNS / f"compact-{export.macs}"
    if not supernet.is_dir():
        flora("build", export.model, "--data", f"{fashion},split=train,fold=1/12,limit=512", "-o", supernet)
    if not compact.is_dir():
        flora("materialize", supernet, "--uniform-macs", f"{export.macs}%", "-o", compact)
    return compact


def flora(*args: object) -> str:
    """What the command prints, whether its gate fails or not; any other failure ends the benchmark."""
    command = [sys.executable, "-c", "from flora.cli import main; main()", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, GATE_FAILED):
        sys.exit(f"flora {' '.join(command[3:])} ended with {done.returncode}: {done.stderr}")
    return done.stdout
