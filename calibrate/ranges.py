"""Ranges of a model's activations over calibration images, by ONNX Runtime's calibrators.

Streamed: a batch goes through the model, its ranges or histograms are merged, and it is gone, so memory does not grow
with the number of images.
"""

import contextlib
import io
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization.calibrate import (
    CalibraterBase,
    CalibrationDataReader,
    CalibrationMethod,
    TensorsData,
    create_calibrator,
)

from calibrate.files import open_session
from flora.errors import InputError, near_matches

# How a range follows from what was seen: all of it, all but the rarest values, or what loses least information.
METHODS = {
    "min-max": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
OPERATORS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """What one method made of so many images; `tensors` is ONNX Runtime's own record."""

    method: str
    images: int
    tensors: TensorsData


class _OneBatch(CalibrationDataReader):
    def __init__(self, feed: dict[str, np.ndarray]) -> None:
        self._feed: dict[str, np.ndarray] | None = feed

    def get_next(self) -> dict[str, np.ndarray] | None:
        feed, self._feed = self._feed, None
        return feed


def measure_ranges(model: Path, batches: Iterable[np.ndarray], method: str, *, threads: int | None = None) -> Ranges:
    """The ranges of all inputs and outputs of `OPERATORS` in the ONNX file `model` over `batches` [B, C, H, W].

    `InputError` without images, for images that are all of one value, and naming the first layer whose activations are
    not finite.
    """
    if method not in METHODS:
        raise InputError(
            f"{method!r} is no way to calibrate; give one of {', '.join(METHODS)}.{near_matches(method, METHODS)}"
        )
    graph = onnx.load(model, load_external_data=False).graph
    seen, low, high = 0, np.inf, -np.inf
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        calibrator = _calibrator(model, graph, method, Path(scratch), threads)
        session = open_session(model, threads)
        for batch in batches:
            feed = {graph.input[0].name: batch}
            # The calibrators leave out what is no number, so the logits are looked at as well.
            if not all(np.isfinite(output).all() for output in session.run(None, feed)):
                broken = _name_of_broken(model, graph, feed, threads)
                raise InputError(
                    f"The activations of {broken} are not finite on a calibration image; check the model and images."
                )
            calibrator.collect_data(_OneBatch(feed))
            seen, low, high = seen + len(batch), min(low, batch.min()), max(high, batch.max())
        if not seen:
            raise InputError("There are no calibration images; give a set that holds some.")
        if low == high:
            raise InputError("All calibration images are of one and the same value; give real ones.")
        return Ranges(method=method, images=seen, tensors=calibrator.compute_data())


def unit_ranges(model: Path) -> Ranges:
    """Ranges of one for every product of the ONNX file `model`: for its time, which does not depend on values."""
    nodes = [node for node in onnx.load(model, load_external_data=False).graph.node if node.op_type in OPERATORS]
    names = {name for node in nodes for name in (*node.input, *node.output)}
    ends = {name: (np.float32(-1), np.float32(1)) for name in names}
    return Ranges(method="min-max", images=0, tensors=TensorsData(CalibrationMethod.MinMax, ends))


def _calibrator(model: Path, graph: Any, method: str, scratch: Path, threads: int | None) -> CalibraterBase:
    # It writes beside the file that it is given, so it gets one with the same weights in a place of its own.
    beside = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
    for name in (model.name, *beside):
        shutil.copyfile(model.parent / name, scratch / name)
    # Whatever ends a method finds, the file that is made from them has symmetric ranges (`calibrate.static`).
    calibrator = create_calibrator(
        scratch / model.name,
        OPERATORS,
        augmented_model_path=str(scratch / f"augmented-{method}.onnx"),
        calibrate_method=METHODS[method],
        use_external_data_format=any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in graph.initializer),
        extra_options={"symmetric": method != "entropy"},
    )
    calibrator.infer_session = open_session(Path(calibrator.augmented_model_path), threads)
    return calibrator


def _name_of_broken(model: Path, graph: Any, feed: dict[str, np.ndarray], threads: int | None) -> str:
    """The first node whose output is not finite, of those whose ranges are measured."""
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, about what is looked for here
        calibrator = _calibrator(model, graph, "min-max", Path(scratch), threads)
        calibrator.collect_data(_OneBatch(feed))
        found = calibrator.compute_data()
    broken = {name for name, data in found.items() if not np.isfinite(np.ravel(data.range_value)).all()}
    return next((node.name for node in graph.node if broken & set(node.output)), graph.output[0].name)
