"""Quantizing one ONNX file, and how sensitive its layers are: without a bundle, a gate, or torch."""

import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import onnx
from pydantic import ValidationError

from calibrate.choose import Trial
from calibrate.files import check_not_quantized
from calibrate.half import check_fits_fp16, half_onnx
from calibrate.mixed import products_but, products_by_layer, write_mixed
from calibrate.sensitivity import LayerError, layer_errors, sqnr_db
from export.bundle import QuantizationRecord, load_bundle, size_of
from export.comparison import compare
from export.runtimes import ORT_CPU, runtime_called
from flora.artifact import Document, check_replaceable, new_folder
from flora.errors import InputError, few, near_matches
from flora.imagesets import ImageSetRecord
from flora.onnxfiles import load_onnx
from flora.pipeline.figures import write_sensitivity
from flora.pipeline.precision import (
    ERROR_IMAGES,
    LAYER_IMAGES,
    Judges,
    int8_trials,
    logits_of_file,
    open_judges,
    record_of,
    write_float8,
)
from flora.preprocessing import Preprocessing

SENSITIVITY = "int8-sensitivity.json"


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """`data` needs no labels; without `select_data` every fourth image of it is held out to measure errors on.

    Layers of `keep` stay in FP32, or in what is around the products of an FP8 file, FP16.
    """

    data: str
    select_data: str | None = None
    images: int = 128
    seed: int = 0
    runtime: str = ORT_CPU
    threads: int | None = None
    keep: tuple[str, ...] = ()


class Calibrated(Document):
    """What `flora calibrate` wrote: agreement and cosine with the FP32 file on `held_out` images."""

    source: str
    precision: str
    quantization: QuantizationRecord
    held_out: int
    agreement: float
    cosine: float
    sqnr_db: float
    size_bytes: int
    source_bytes: int
    image_sets: dict[str, ImageSetRecord]


class Sensitivity(Document):
    """What `flora sensitivity` found, the most sensitive layer first."""

    source: str
    images: int
    method: str
    layers: list[LayerError]


@dataclass(frozen=True, kw_only=True)
class Source:
    """An ONNX file in FP32, how images become its input, and what certified its bundle if it comes out of one."""

    path: Path
    preprocessing: Preprocessing
    classes: int | None
    bundle: Path | None = None
    evaluation: ImageSetRecord | None = None


def find_source(path: Path) -> Source:
    """The ONNX file `path`, or that of a bundle's model in FP32; `InputError` where there is none that flora wrote."""
    folder, evaluation = None, None
    if path.is_dir():
        bundle = load_bundle(path)
        folder, evaluation = path, bundle.manifest.image_sets.get("evaluation")
        files = [entry for entry in bundle.manifest.artifacts if entry.kind == "onnx" and entry.precision == "fp32"]
        path = bundle.path_of(next((entry for entry in files if entry.role == "candidate"), files[0]))
    model = load_onnx(path)
    check_not_quantized(path)
    described = {entry.key: entry.value for entry in model.metadata_props}
    try:
        preprocessing = Preprocessing.model_validate_json(described["flora.preprocessing"])
    except (KeyError, ValidationError) as error:
        raise InputError(
            f"{path} does not say how images become its input; give an ONNX file that flora export wrote, or a bundle."
        ) from error
    shape = model.graph.output[0].type.tensor_type.shape.dim
    return Source(
        path=path,
        preprocessing=preprocessing,
        classes=shape[-1].dim_value or None if shape else None,
        bundle=folder,
        evaluation=evaluation,
    )


def calibrate(
    model: Path, out: Path, precision: str, request: CalibrationRequest, *, on_step: Callable[[str], None]
) -> Calibrated:
    """Write the ONNX file `out`: `model` in INT8, calibrated the way that costs least, or in FP8."""
    source = find_source(model)
    if out.resolve() == source.path.resolve() or (
        source.bundle and out.resolve().is_relative_to(source.bundle.resolve())
    ):
        raise InputError(f"{out} lies in what is quantized, which stays as it is; give another place.")
    if precision not in runtime_called(request.runtime).files:
        allowed = ", ".join(runtime_called(request.runtime).files)
        raise InputError(
            f"{request.runtime} runs no files in {precision}, only {allowed}; measure on another --runtime."
        )
    judges = _judges(source, request)
    images = judges.held_out(ERROR_IMAGES)
    with tempfile.TemporaryDirectory() as scratch:
        if precision == "fp8":
            on_step("calibrating: min-max")
            high, low = source.path, Path(scratch) / "fp8.onnx"
            record = write_float8(high, low, judges, request.threads)
        else:
            trials = _trials(source.path, Path(scratch), judges, request, on_step)
            high, low = trials[0].source, trials[0].quantized
            record = record_of(trials, judges, dict.fromkeys(request.keep, "asked for"))
        layers = products_by_layer(onnx.load(high), onnx.load(low))
        _check_layers(request.keep, layers)
        mixed = Path(scratch) / "mixed.onnx" if precision == "fp8" else out
        write_mixed(high, low, mixed, products_but(layers, request.keep))
        if precision == "fp8":  # which is for engines
            check_fits_fp16(source.path, judges.batches(), threads=request.threads)
            half_onnx(mixed, out, "fp16")
    as_written = precision in runtime_called(request.runtime).only_shown
    expected = logits_of_file(source.path, images, request.runtime, request.threads)
    found = logits_of_file(out, images, request.runtime, request.threads, as_written=as_written)
    difference = compare(expected, found)
    return Calibrated(
        source=str(model),
        precision=precision,
        quantization=record,
        held_out=len(images),
        agreement=float(difference.agrees.mean()),
        cosine=float(difference.cosine.mean()),
        sqnr_db=sqnr_db(expected, found),
        size_bytes=size_of(out),
        source_bytes=size_of(source.path),
        image_sets=judges.records,
    )


def measured_sensitivity(
    model: Path, out: Path, request: CalibrationRequest, *, on_step: Callable[[str], None]
) -> Sensitivity:
    """The error of each layer of `model` alone in INT8, on held-out images; a table and a figure go to `out`."""
    check_replaceable(out, marker=SENSITIVITY)
    source = find_source(model)
    judges = _judges(source, request)
    images = judges.held_out(LAYER_IMAGES)
    with tempfile.TemporaryDirectory() as scratch:
        best = _trials(source.path, Path(scratch), judges, request, on_step)[0]
        layers = layer_errors(
            best.source,
            best.quantized,
            images,
            threads=request.threads,
            on_layer=lambda done, count: on_step(f"measuring layers: {done} of {count}"),
        )
    found = Sensitivity(source=str(model), images=len(images), method=best.name, layers=layers)
    with new_folder(out, marker=SENSITIVITY) as folder:
        found.save(folder / SENSITIVITY)
        write_sensitivity(folder / "int8-sensitivity.html", layers)
    return found


def _judges(source: Source, request: CalibrationRequest) -> Judges:
    judges = open_judges(
        request.data,
        request.select_data,
        source.preprocessing,
        source.classes,
        count=request.images,
        seed=request.seed,
    )
    if source.evaluation is not None:
        for role, record in judges.records.items():
            record.refuse_overlap(source.evaluation, own_role=role, other_role="evaluation")
    return judges


def _trials(
    source: Path, folder: Path, judges: Judges, request: CalibrationRequest, on_step: Callable[[str], None]
) -> list[Trial]:
    return int8_trials(
        *(source, folder, judges, request.runtime, request.threads), lambda trial: on_step(f"calibrating: {trial}")
    )


def _check_layers(keep: Collection[str], layers: Collection[str]) -> None:
    if unknown := [layer for layer in keep if layer not in layers]:
        raise InputError(
            f"{few(unknown)}: no such layer has a product to quantize; there are {few(list(layers), 5)}."
            f"{near_matches(unknown[0], layers)}"
        )
