"""The bundle: a folder with everything that is shipped, and a manifest that says what it is and what was proven.

The manifest holds the SHA-256 of every other file, so that a bundle can be checked on another machine; golden images
and logits show whether an artefact computes there what it computed here. Only an artefact that passed its verification
may be recommended.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from export.attestation import Attestation
from export.benchmark import LatencyStats
from export.comparison import compare
from export.engine_record import EngineRecord
from export.runners import Runner
from export.runtimes import ORT_CPU
from export.thresholds import THRESHOLDS, Thresholds
from export.verify import VerifyReport
from flora.artifact import Document, new_file, sha256_of_file
from flora.errors import GateFailedError, InputError, few, near_matches
from flora.imagesets import ImageSetRecord
from flora.preprocessing import Preprocessing
from flora.ranks.cost import Rank

MANIFEST = "manifest.json"
GOLDEN = "golden.safetensors"
MODEL_FOLDER = "model"
REPORT = "report.html"
LOGITS = "logits/"

Status = Literal["verified", "failed", "built, not run"]


class QuantizationRecord(BaseModel):
    """How a file of lower precision came to be, from so many calibration images with this digest.

    `trials` has the ratio of signal to quantization noise of the logits, in decibels, of each way to calibrate that was
    tried; `sensitivity` that of each layer alone, where it was measured. `high` are layers that are not quantized, and
    why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    digest: str | None = None
    method: str
    basis: str
    weight_bits: int = 8
    trials: dict[str, float] = {}
    high: dict[str, str] = {}
    sensitivity: dict[str, float] = {}

    @property
    def name(self) -> str:
        """What its trial is called."""
        return f"{self.method}, {self.basis} basis, {self.weight_bits}-bit weights"


class PartCost(BaseModel):
    """What one part of a model takes over all blocks: MACs of one image, and its share of the runtime's time.

    The share is None where the runtime was not profiled.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    macs: int
    time_share: float | None = None


class LayerEntry(BaseModel):
    """One layer that could be factorized; `macs` of one image in the exported file, `dense_macs` in the dense model.

    `sensitivity` is the divergence from the dense model, in nats, with this layer alone cut to `probe_rank`, where that
    was measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    in_features: int
    out_features: int
    tokens: int
    rank: Rank
    is_pivoted: bool = False
    macs: int
    dense_macs: int
    sensitivity: float | None = None
    probe_rank: int | None = None


class ArtifactEntry(BaseModel):
    """One artefact: `path` is relative to the bundle; `reason` says why it failed, was not run or not chosen.

    One that is not `certified` was run on the selection images alone, or not at all: it is not to be shipped.

    `runtime` is what an ONNX file was verified and measured on. In int8-fp16, products are in INT8 and what is around
    them in FP16. `parts` says of files in FP32 where their MACs and time go.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    path: str
    kind: Literal["onnx", "engine", "model"]
    runtime: str = ORT_CPU
    precision: Literal["fp32", "fp16", "bf16", "int8", "int8-fp16", "fp8"]
    role: Literal["yardstick", "candidate"]
    status: Status
    reason: str | None = None
    certified: bool = True
    sha256: str
    size_bytes: int
    macs: int | None = None
    params: int | None = None
    parts: dict[str, PartCost] = {}
    spec: EngineRecord | None = None
    quantization: QuantizationRecord | None = None
    attestation: Attestation | None = None

    @property
    def fp32_source(self) -> str:
        """Where the ONNX file in FP32 lies of the model that an engine was built from."""
        assert self.spec is not None
        return fp32_path(self.spec.source, self.precision)

    @model_validator(mode="after")
    def _check(self) -> Self:
        path = PurePosixPath(self.path)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{self.name}: the path {self.path} leads out of the bundle")
        if (self.kind == "engine") != (self.spec is not None):
            raise ValueError(f"{self.name}: an engine, and nothing else, has a spec")
        if self.parts and (found := sum(part.macs for part in self.parts.values())) != self.macs:
            raise ValueError(f"{self.name}: its parts have {found} MACs together, the whole has {self.macs}")
        return self


class Manifest(Document):
    """`manifest.json`. `files` has every file but itself; `image_sets` is by role, `latency` by artefact.

    `layers` are those that low rank could cut, in the model's order.
    `thresholds` are what each kind of stage had to hold, and has to in later verifications.
    `require` is what share of the products lower precisions must compute in, and
    `unmet` has a line for each file that does not compute in the precision that was required of it.
    `selection` is what was found on the images that precisions were chosen by, `verification` on the evaluation images.
    """

    model: str
    class_names: list[str] | None = None
    preprocessing: Preprocessing
    files: dict[str, str]
    artifacts: list[ArtifactEntry]
    layers: list[LayerEntry] = []
    recommended: str | None = None
    recommendation_reason: str = ""
    thresholds: dict[str, Thresholds] = THRESHOLDS
    require: str | None = None
    unmet: list[str] = []
    selection: VerifyReport | None = None
    verification: VerifyReport | None = None
    latency: dict[str, LatencyStats] = {}
    image_sets: dict[str, ImageSetRecord] = {}
    versions: dict[str, str] = {}
    device: dict[str, str] = {}
    command: list[str] = []
    created: str
    notes: list[str] = []

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [entry.name for entry in self.artifacts]
        if len(set(names)) != len(names):
            raise ValueError(f"artefact names must differ, got {names}")
        for entry in self.artifacts:
            if self.files.get(entry.path) != entry.sha256:
                raise ValueError(f"{entry.name}: {entry.path} is not among the files with the same SHA-256")
        if self.recommended is not None:
            if self.recommended not in names:
                raise ValueError(f"recommended is {self.recommended}, artefacts are {names}")
            if self.artifact(self.recommended).status != "verified":
                raise ValueError(f"recommended is {self.recommended}, which is not verified")
        return self

    def artifact(self, name: str) -> ArtifactEntry:
        """The artefact of that name; `InputError` where there is none."""
        for entry in self.artifacts:
            if entry.name == name:
                return entry
        names = [entry.name for entry in self.artifacts]
        raise InputError(
            f"The bundle has no artefact {name!r}, only {', '.join(names) or 'none'}.{near_matches(name, names)}"
        )


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle on disk."""

    folder: Path
    manifest: Manifest

    def path_of(self, entry: ArtifactEntry) -> Path:
        return self.folder / entry.path


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle's manifest; `InputError` where the folder is none or the manifest is not valid."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} is no bundle: it holds no {MANIFEST}. Give a folder that flora export wrote.")
    return Bundle(folder=folder, manifest=Manifest.load(folder / MANIFEST))


def fp32_path(path: str, precision: str) -> str:
    """Where the file in FP32 lies of the model whose file of this precision lies at `path`."""
    return path.replace(f"-{precision}.", "-fp32.")


def size_of(path: Path) -> int:
    """Bytes of an ONNX file and of the weights that may lie beside it."""
    beside = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a bundle but its manifest, by path relative to the folder."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: sha256_of_file(path) for name, path in named.items() if name != MANIFEST}


def check_hashes(bundle: Bundle, found: Mapping[str, str] | None = None) -> list[str]:
    """One line for each file that was altered, is missing, or does not belong to the bundle.

    `found` are the hashes of its files, if they are known already.
    """
    recorded, found = bundle.manifest.files, hash_files(bundle.folder) if found is None else found
    engines = {entry.path: entry.size_bytes for entry in bundle.manifest.artifacts if entry.kind == "engine"}
    altered = [
        f"{name} {_how_altered((bundle.folder / name).stat().st_size, engines.get(name))}"
        for name in recorded
        if name in found and found[name] != recorded[name]
    ]
    missing = [f"{name} is missing" for name in recorded if name not in found]
    unexpected = [f"{name} is not part of the bundle" for name in found if name not in recorded]
    return altered + missing + unexpected


def check_unaltered(bundle: Bundle) -> None:
    """Raise `GateFailedError` unless every file is as it was exported: nothing of another bundle is to be run."""
    if not (problems := check_hashes(bundle)):
        return
    advice = _advice(bundle, problems)
    raise GateFailedError(
        f"{bundle.folder} is not what was exported: {'; '.join(problems)}. Nothing of it was run.{advice}"
    )


def _advice(bundle: Bundle, problems: Sequence[str]) -> str:
    """What to do about files that are not as they were exported, where there is something."""
    for kind, advice in (
        ("engine", f"flora export {bundle.folder} --rebuild-engine builds it anew"),
        ("onnx", f"flora verify {bundle.folder} --bisect names the first layer that differs"),
    ):
        paths = tuple(entry.path for entry in bundle.manifest.artifacts if entry.kind == kind)
        if paths and all(line.startswith(paths) for line in problems):
            return f" {advice}."
    return ""


def _how_altered(size_bytes: int, of_bytes: int | None) -> str:
    if of_bytes is not None and size_bytes < of_bytes:
        return f"is truncated, {size_bytes:,} of {of_bytes:,} bytes"
    return "was altered"


def write_golden(path: Path, images: np.ndarray, logits: Mapping[str, np.ndarray]) -> None:
    """Keep model inputs [N, C, H, W] and, by the path of each artefact, the logits [N, classes] it must give."""
    if len(images) == 0 or any(len(values) != len(images) for values in logits.values()):
        raise InputError(
            f"Golden outputs need logits for each of 1 or more images; got {len(images)} images and logits for "
            f"{', '.join(str(len(values)) for values in logits.values()) or 'none'}."
        )
    arrays = {"images": images} | {f"{LOGITS}{artifact}": values for artifact, values in logits.items()}
    with new_file(path) as partial:
        # As bytes: the library's own writer hides a full disk behind an error of its own.
        partial.write_bytes(save({name: np.ascontiguousarray(values, np.float32) for name, values in arrays.items()}))


def read_golden(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Golden images, and logits by artefact; `InputError` where the file is missing, truncated or something else."""
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; export the bundle again.") from error
    except SafetensorError as error:
        raise InputError(f"{path} is no complete safetensors file ({error}); export the bundle again.") from error
    logits = {name.removeprefix(LOGITS): values for name, values in tensors.items() if name.startswith(LOGITS)}
    if "images" not in tensors or len(logits) != len(tensors) - 1:
        raise InputError(f"{path} holds no golden images and logits but {few(tensors)}; export the bundle again.")
    return tensors["images"], logits


def check_golden(bundle: Bundle, entry: ArtifactEntry, runner: Runner) -> list[str]:
    """One line for each way in which `runner`, which runs `entry`, strays from its golden logits.

    Held are the thresholds of its precision but for agreement and accuracy, which a few images cannot judge. An engine
    must give the logits of the ONNX file that it was built from, or of that file in FP32.
    """
    images, logits_by_path = read_golden(bundle.folder / GOLDEN)
    paths = [entry.path] if entry.spec is None else [entry.spec.source, entry.fp32_source]
    path = next((path for path in paths if path in logits_by_path), None)
    if path is None:
        return [f"{entry.name}: {GOLDEN} has no logits of {paths[0]}"]
    golden, logits = logits_by_path[path], runner(images)
    if logits.shape != golden.shape:
        return [f"{entry.name}: logits have the shape {list(logits.shape)}, golden are {list(golden.shape)}"]
    if not np.isfinite(logits).all():
        return [f"{entry.name}: logits are not finite"]
    difference = compare(golden, logits)
    figures = {
        "cosine": float(difference.cosine.mean()),
        "max_relative": difference.max_relative,
        "kl": float(difference.kl.mean()),
    }
    limits = bundle.manifest.thresholds[entry.precision].model_copy(update={"min_agreement": None, "max_drop": None})
    return [f"{entry.name}: against golden logits {line}" for line in limits.exceeded(figures)]
