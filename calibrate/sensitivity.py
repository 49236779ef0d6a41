"""How far each layer alone, in low precision, moves the logits; and how few layers must go back to hold a gate."""

import bisect
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto
from pydantic import BaseModel, ConfigDict

from calibrate.files import open_session
from calibrate.mixed import mixed_model, products_by_layer
from flora.errors import InputError
from flora.onnxfiles import fits_in_one_file

# Said where there is no error at all.
EXACT_DB = 200.0


class LayerError(BaseModel):
    """`sqnr_db` is the power of the logits over that of their error with this layer alone in low precision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: str
    products: int
    sqnr_db: float


def sqnr_db(logits: np.ndarray, quantized: np.ndarray) -> float:
    """Signal-to-quantization-noise ratio in decibels of logits of one shape; no number counts as no signal."""
    if not np.isfinite(quantized).all():
        return -EXACT_DB
    signal, noise = float(np.square(logits).sum()), float(np.square(logits - quantized).sum())
    return 10 * math.log10(signal / noise) if signal and noise else EXACT_DB if signal else -EXACT_DB


def layer_errors(
    source: Path,
    quantized: Path,
    images: np.ndarray,
    *,
    threads: int | None = None,
    as_written: bool = False,
    on_layer: Callable[[int, int], None] = lambda done, layers: None,
) -> list[LayerError]:
    """The error of each layer that is in low precision in `quantized`, on `images` [B, C, H, W], largest first.

    Runs on ONNX Runtime's CPU provider, by its fast kernels or each node `as_written`. `on_layer` is called with the
    layers done and their number.
    """
    if not len(images):
        raise InputError("There are no images to measure the sensitivity on; give a set that holds some.")
    high, low = onnx.load(source), onnx.load(quantized)
    layers = products_by_layer(high, low)
    if not layers:
        raise InputError(f"{quantized} has nothing in low precision; give a quantized file.")
    expected = _logits(mixed_model(high, low, ()), images, threads, as_written)
    errors = []
    for done, (layer, products) in enumerate(layers.items(), start=1):
        found = _logits(mixed_model(high, low, products), images, threads, as_written)
        errors.append(LayerError(layer=layer, products=len(products), sqnr_db=sqnr_db(expected, found)))
        on_layer(done, len(layers))
    return sorted(errors, key=lambda error: error.sqnr_db)


def order_of_return(errors: Sequence[LayerError], seconds: Mapping[str, float]) -> list[str]:
    """Layers in the order in which they go back to high precision: most error first for the time that it costs.

    `seconds` is what low precision saves in each layer; any unit will do. A layer that saves nothing goes first.
    """

    def worth(error: LayerError) -> float:
        saved = seconds[error.layer]
        return math.inf if saved <= 0 else 10 ** (-error.sqnr_db / 10) / saved

    return [error.layer for error in sorted(errors, key=worth, reverse=True)]


def fewest(layers: int, holds: Callable[[int], bool]) -> int:
    """The smallest number of layers, of so many, with which `holds`; bisected, and all of them are taken to hold."""
    return bisect.bisect_left(range(layers), True, key=holds)


def _logits(model: ModelProto, images: np.ndarray, threads: int | None, as_written: bool) -> np.ndarray:
    """Its logits; of a large `model` the weights are taken out."""
    if fits_in_one_file(model.ByteSize()):
        session = open_session(model.SerializeToString(), threads, as_written=as_written)
        return session.run(None, {session.get_inputs()[0].name: images})[0]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        onnx.save(model, path, save_as_external_data=True, location="weights")
        session = open_session(path, threads, as_written=as_written)
        return session.run(None, {session.get_inputs()[0].name: images})[0]
