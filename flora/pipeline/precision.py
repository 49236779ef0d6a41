"""Lower precisions of an exported model: calibrated by measurement, mixed until the gate holds.

Everything is chosen on the selection images and on the runtime that the files are for. A layer that takes longer in
INT8 stays in FP32; where the gate fails, layers go back, those first that lose most for the time they save.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from calibrate.batches import balanced_choice
from calibrate.choose import Trial, quantize_best
from calibrate.float8 import quantize_onnx_to_float8
from calibrate.half import check_fits_fp16, half_onnx
from calibrate.mixed import kind_of, products_but, products_by_layer, write_mixed
from calibrate.ranges import measure_ranges
from calibrate.sensitivity import LayerError, fewest, layer_errors, order_of_return, sqnr_db
from export.benchmark import paired_latency
from export.bundle import QuantizationRecord
from export.images import ChoosableImages, ImageSet
from export.runtimes import ORT_CPU, open_runner, runtime_called
from export.tally import Tally
from export.thresholds import Thresholds
from export.verify import judged
from flora.errors import InputError, near_matches
from flora.imagesets import ImageSetRecord, at_most
from flora.pipeline.images import Unlabelled, calibration_and_selection, labels_are_classes, open_images
from flora.preprocessing import Preprocessing

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-fp16", "fp8")
# What engines are built from in the place of INT8 files, which suit the processor that they are run on.
OF_ENGINES = {"int8": "int8-fp16"}
CALIBRATED = ("int8", "int8-fp16", "fp8")
CALIBRATION_BATCH = 4
SELECTION_IMAGES = 2000
# Images that the error of each trial, and of each layer, is measured on: logits are many numbers an image.
ERROR_IMAGES, ERROR_BATCH = 64, 16
LAYER_IMAGES = 16
LATENCY_REPEATS = 11
# A share of the model's time that is not told from none; of selection images, too few to tell a point of top-1.
NO_TIME, FEW_IMAGES = 0.01, 100


def precisions_asked(names: Sequence[str], runtime: str, *, has_engines: bool) -> tuple[str, ...]:
    """The precisions to build, FP32 first; `auto` stands for those that can pay on the runtime.

    Engines have an INT8 file of their own.

    `InputError` for one that neither the runtime nor an engine can take.
    """
    allowed = PRECISIONS if has_engines else runtime_called(runtime).files
    found = ["fp32"]
    for name in names:
        if name not in (*PRECISIONS, "auto"):
            raise InputError(
                f"{name!r} is no precision; give {', '.join(PRECISIONS)} or auto.{near_matches(name, PRECISIONS)}"
            )
        if name != "auto" and name not in allowed:
            raise InputError(
                f"{runtime} runs no files in {name}, only {', '.join(allowed)}; "
                "leave it out, or build an engine that takes it with --to."
            )
        found += runtime_called(runtime).worthwhile if name == "auto" else [name]
    if has_engines:
        found += [OF_ENGINES[name] for name in found if name in OF_ENGINES]
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class Judges:
    """Images by purpose: `calibration` for ranges, `selection` for every choice.

    `spread` are the selection images that errors are measured on where all take too long, as many of each class.
    """

    calibration: ImageSet
    selection: ImageSet
    spread: ChoosableImages
    records: dict[str, ImageSetRecord]

    def notes(self) -> Iterator[str]:
        """What images so few do not show."""
        if len(self.selection) < FEW_IMAGES:
            yield (
                f"Precisions were chosen on {len(self.selection)} selection images, which hardly tell one from "
                f"another; give {FEW_IMAGES} or more with --select-data."
            )

    def batches(self) -> "_Batches":
        return _Batches(self.calibration)

    def held_out(self, count: int) -> np.ndarray:
        """Selection images [count, C, H, W], or as many as there are, as many of each class."""
        return next(iter(spread_over(self.spread, count).batches(count)))[0]


def refuse_streamed(images: ImageSet, text: str) -> None:
    """Raise `InputError` for images that come in an order of their own."""
    if getattr(images, "is_streamed", False):
        raise InputError(
            f"{text} is streamed; images for lower precisions are chosen by class, so name some that are read by index."
        )


def spread_over(images: ChoosableImages, count: int, *, seed: int = 0) -> ChoosableImages:
    """`count` of the images, as many of each class: sets come in the order of their classes."""
    return images.chosen(balanced_choice(np.asarray(images.labels()), count, seed=seed))


def open_judges(
    calib_data: str,
    select_data: str | None,
    preprocessing: Preprocessing,
    classes: int | None,
    *,
    count: int,
    seed: int,
) -> Judges:
    """`count` calibration images, balanced by class, and up to 2,000 selection images; refused where they overlap."""
    calibration_text, selection_text = calibration_and_selection(calib_data, select_data)
    calibration = open_images(calibration_text, preprocessing)
    refuse_streamed(calibration, calibration_text)
    refuse_streamed(selection := open_images(at_most(selection_text, SELECTION_IMAGES), preprocessing), selection_text)
    chosen = spread_over(calibration, count, seed=seed)
    if not len(chosen) or not len(selection):
        raise InputError(
            f"{calibration_text} gives {len(chosen)} calibration images and {selection_text} {len(selection)} to "
            "choose by; at least one of each is needed."
        )
    records = {"calibration": chosen.record(), "selection": selection.record()}
    records["selection"].refuse_overlap(records["calibration"], own_role="selection", other_role="calibration")
    usable = labels_are_classes(selection, classes)
    return Judges(
        calibration=chosen,
        selection=selection if usable else Unlabelled(selection),
        spread=selection,
        records=records,
    )


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """What files of lower precision are made and judged with.

    `yardstick` is the dense model's FP32 file, from which top-1 may drop as far as `limits["lowrank"]` says; the others
    hold what a precision may change. `for_engines`, INT8 is not fitted to this processor and has FP16 around it.
    """

    judges: Judges
    yardstick: Path
    limits: dict[str, Thresholds]
    runtime: str
    threads: int | None
    batch: int
    scratch: Path
    on_step: Callable[[str], None]
    for_engines: bool = False
    known: dict[Path, list[np.ndarray]] = field(default_factory=dict)

    def failures(self, path: Path, precision: str, source: Path) -> list[str]:
        """What the file misses on the selection images, against `source` and the yardstick."""
        with open_runner(self.runtime, path, threads=self.threads, as_written=self.for_engines) as run:
            seen = [(run(images), labels) for images, labels in self.judges.selection.batches(self.batch)]
        lines = []
        for kind, file in ((precision, source), ("lowrank", self.yardstick)):
            reference, low = Tally(file.stem), Tally(path.stem)
            for (found, labels), expected in zip(seen, self._known(file), strict=True):
                reference.add(expected, labels, None)
                low.add(found, labels, expected)
            lines += judged(low, self.limits[kind], reference)[1]
        return lines

    def _known(self, file: Path) -> list[np.ndarray]:
        """The logits of an FP32 file on the selection images, by batch: computed once, for every look needs them."""
        if file not in self.known:
            with open_runner(self.runtime, file, threads=self.threads) as run:
                self.known[file] = [run(images) for images, _ in self.judges.selection.batches(self.batch)]
        return self.known[file]

    def time_ratio(self, path: Path, other: Path) -> float:
        """The time of `path` over that of `other`, paired."""
        images = self.judges.held_out(self.batch)
        images = np.resize(images, (self.batch, *images.shape[1:]))
        with (
            open_runner(self.runtime, other, threads=self.threads) as first,
            open_runner(self.runtime, path, threads=self.threads) as second,
        ):
            return paired_latency({"other": first, "path": second}, images, repeats=LATENCY_REPEATS)["path"].ratio


def write_precision(precision: str, source: Path, out: Path, bench: Workbench, name: str) -> QuantizationRecord | None:
    """Write the FP32 file `source`, of the model called `name`, in another precision; what was chosen, if anything.

    `BeyondRangeError` where the precision has no numbers for what the model holds or gives.
    """
    if precision == "int8":
        return _int8(source, out, bench, name, precision)
    if precision in OF_ENGINES.values():
        known = bench.known if bench.runtime == ORT_CPU else {}
        return _int8(source, out, replace(bench, for_engines=True, runtime=ORT_CPU, known=known), name, precision)
    if precision != "bf16":
        bench.on_step(f"looking whether fp16 holds what {name} gives")
        check_fits_fp16(source, bench.judges.batches(), threads=bench.threads)
    bench.on_step(f"writing {name} in {precision}")
    if precision == "fp8":
        full = bench.scratch / "fp8.onnx"
        record = write_float8(source, full, bench.judges, bench.threads)
        half_onnx(full, out, "fp16")
        return record
    half_onnx(source, out, precision)
    return None


def write_float8(source: Path, out: Path, judges: Judges, threads: int | None) -> QuantizationRecord:
    """Write the FP32 file `source` in FP8, by the largest values of the calibration images."""
    ranges = measure_ranges(source, judges.batches(), "min-max", threads=threads)
    quantize_onnx_to_float8(source, out, ranges)
    digest = judges.records["calibration"].digest
    return QuantizationRecord(images=ranges.images, digest=digest, method=ranges.method, basis="plain")


def _int8(source: Path, out: Path, bench: Workbench, name: str, precision: str) -> QuantizationRecord:
    folder = bench.scratch / out.stem
    folder.mkdir()
    trials = int8_trials(
        source,
        folder,
        bench.judges,
        bench.runtime,
        bench.threads,
        lambda trial: bench.on_step(f"calibrating {name} in {precision}: {trial}"),
        for_engines=bench.for_engines,
    )
    best = trials[0]
    if bench.for_engines:  # in the basis that was chosen
        check_fits_fp16(best.source, bench.judges.batches(), threads=bench.threads)
    layers = products_by_layer(onnx.load(best.source), onnx.load(best.quantized))

    def write(high: Sequence[str]) -> None:
        mixed = folder / "mixed.onnx" if bench.for_engines else out
        write_mixed(best.source, best.quantized, mixed, products_but(layers, high))
        if bench.for_engines:
            half_onnx(mixed, out, "fp16")

    saved = dict.fromkeys(layers, 1.0) if bench.for_engines else _saved(layers, best, bench, name)
    slower = [layer for layer in layers if saved[layer] < 0]
    if len(slower) == len(layers):
        slower = []  # INT8 pays nowhere here: the file shows what it costs
    write(slower)
    errors: list[LayerError] = []
    high = slower
    if bench.failures(out, precision, source):
        bench.on_step(f"measuring how sensitive each layer of {name} is")
        errors = layer_errors(
            best.source,
            best.quantized,
            bench.judges.held_out(LAYER_IMAGES),
            threads=bench.threads,
            as_written=bench.for_engines,
        )
        open_to = [error for error in errors if error.layer not in slower]

        def holds(order: Sequence[str], count: int) -> bool:
            bench.on_step(f"checking {name} in {precision}: {len(slower) + count} of {len(layers)} layers stay high")
            write([*slower, *order[:count]])
            return not bench.failures(out, precision, source)

        # A gate that no layer with much error holds may leave room for those with the least, whatever they save.
        by_error = [error.layer for error in open_to]
        for order in (by_error,) if bench.for_engines else (order_of_return(open_to, saved), by_error):
            count = fewest(len(order), partial(holds, order))
            if count < len(order):
                high = [*slower, *order[:count]]
                break
        # With none left in INT8 there would be nothing to ship: all of it stays, labelled with what it misses.
        write(high)
    reasons = {layer: "int8 takes longer" if layer in slower else "for the gate" for layer in layers if layer in high}
    return record_of(trials, bench.judges, reasons, errors)


def record_of(
    trials: Sequence[Trial], judges: Judges, high: dict[str, str], errors: Sequence[LayerError] = ()
) -> QuantizationRecord:
    """What is kept of an INT8 file, which came of the first of `trials`; `high` are layers not in INT8, and why."""
    return QuantizationRecord(
        images=len(judges.calibration),
        digest=judges.records["calibration"].digest,
        method=trials[0].method,
        basis=trials[0].basis,
        weight_bits=trials[0].weight_bits,
        trials={trial.name: round(trial.sqnr_db, 2) for trial in trials},
        high=high,
        sensitivity={error.layer: round(error.sqnr_db, 2) for error in errors},
    )


def logits_of_file(
    path: Path, images: np.ndarray, runtime: str, threads: int | None, *, as_written: bool = False
) -> np.ndarray:
    """Logits [B, classes] of an ONNX file on images [B, C, H, W]."""
    with open_runner(runtime, path, threads=threads, as_written=as_written) as run:
        return np.concatenate([run(images[i : i + ERROR_BATCH]) for i in range(0, len(images), ERROR_BATCH)])


def int8_trials(
    source: Path,
    folder: Path,
    judges: Judges,
    runtime: str,
    threads: int | None,
    on_trial: Callable[[str], None],
    *,
    for_engines: bool = False,
) -> list[Trial]:
    """INT8 files of `source` in `folder`, the best first, by their logits on images held out, on `runtime`.

    `for_engines` they are judged with FP16 around the products, as engines get them, and have 8-bit weights.
    """
    images = judges.held_out(ERROR_IMAGES)
    expected = logits_of_file(source, images, runtime, threads)

    def error(file: Path) -> float:
        if for_engines:
            half_onnx(file, file := folder / "half.onnx", "fp16")
        return sqnr_db(expected, logits_of_file(file, images, runtime, threads, as_written=for_engines))

    return quantize_best(
        source,
        folder,
        judges.batches(),
        len(judges.calibration),
        sqnr_db=error,
        weight_bits=(8,) if for_engines else (8, 7),
        threads=threads,
        on_trial=on_trial,
    )


def _saved(layers: dict[str, list[str]], best: Trial, bench: Workbench, name: str) -> dict[str, float]:
    """What INT8 saves in each layer, as a share of the model's time: measured for each kind of layer at once.

    Nothing, where a kind of layer takes hardly longer: bytes are smaller all the same.
    """
    bench.on_step(f"timing kinds of layers of {name} in int8")
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kinds.setdefault(kind_of(layer), []).append(layer)
    saved: dict[str, float] = {}
    without = bench.scratch / "without.onnx"
    for members in kinds.values():
        write_mixed(best.source, best.quantized, without, products_but(layers, members))
        share = bench.time_ratio(without, best.quantized) - 1
        share = 0.0 if -NO_TIME < share < 0 else share
        saved |= {layer: share / len(members) for layer in members}
    without.unlink()
    return saved


class _Batches:
    """The images of a set in batches, as often as they are asked for."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images

    def __iter__(self) -> Iterator[np.ndarray]:
        return (images for images, _ in self._images.batches(CALIBRATION_BATCH))
