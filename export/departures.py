"""Where a file of lower precision, or a damaged one, departs from its FP32 file: the first layer that is wrong itself.

Both graphs are cut where they hold the same tensor (`export.cuts`) and run piece by piece (`export.pieces`). A piece of
the suspect file is given the values that the reference has at the cuts, so that its output shows its own error: what
earlier layers did wrong never reaches it, and what it does wrong blames nobody after it. It departs where the error is
more than its arithmetic explains; the limits say how much that is.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from onnx import TensorProto

from export.cuts import Graph, Layer, common_layers, read_graph
from export.graph_runs import EXACT_DB, decibels, errors_in_file
from export.pieces import FLOATS, Comparer, Piece, Seen
from flora.errors import InputError

# Least signal to noise of a piece's own output. In FP32 two kernels may add in another order; in FP16, attention of
# large logits keeps some 35 dB; a product in 8 bits keeps 17 where a processor's kernel saturates, and attention that
# is spread over many tokens loses most of its shares, which are below half a step.
FP32_DB, FP16_DB, PRODUCT_DB, ATTENTION_DB = 60.0, 25.0, 10.0, 3.0
# The same with activations left as they are, which shows quantized weights alone: 7 bits keep 35 dB, FP8 some 30.
WEIGHTS_DB = 20.0
# An activation uses less than this part of its codes where its step is too large. Sound files were seen to use 1 / 2.1.
MOST_STEPS = 3.0
LARGEST_CODE: dict[int, int] = {TensorProto.INT8: 127}

Kind = Literal["overflow", "not finite", "scale", "weights", "error"]


@dataclass(frozen=True, kw_only=True)
class Departure:
    """A layer that departs by itself, at the `node` that makes `tensor`, or quantizes it for the layer with a scale.

    Ratios of signal to noise are in decibels: `own_db` of the layer given the reference's inputs, where `limit_db`
    would do; in the whole file, for the first one, `entering_db` of what reaches the layer and `leaving_db` of what it
    gives. `largest` is the largest absolute value that the reference has there, none between two factors. For a scale,
    `steps_ratio` is how many times larger it is than the images need.
    """

    layer: str
    node: str
    operator: str
    tensor: str
    kind: Kind
    own_db: float
    limit_db: float | None
    entering_db: float | None = None
    leaving_db: float | None = None
    largest: float | None = None
    steps_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All layers that depart by themselves, first to last, of so many; `logits_db` is of the whole file."""

    departures: tuple[Departure, ...]
    layers: int
    images: int
    logits_db: float


def first_departure(
    reference: Path, suspect: Path, images: np.ndarray, *, threads: int | None = None, as_written: bool = False
) -> Departure | None:
    """The first layer of the ONNX file `suspect` that departs from `reference`, on images [B, C, H, W]; or none.

    `as_written`, each node of the suspect is run by itself, as for a device that is not here. `InputError` for files
    that are not of the same model or cannot be run.
    """
    found = compare_files(reference, suspect, images, threads=threads, as_written=as_written).departures
    return found[0] if found else None


def compare_files(
    reference: Path, suspect: Path, images: np.ndarray, *, threads: int | None = None, as_written: bool = False
) -> Comparison:
    """The same with all layers that depart, each by itself, and the error of the logits."""
    if not len(images):
        raise InputError("There are no images to compare the files on; give a set that holds some.")
    first, second = read_graph(reference), read_graph(suspect)
    layers = common_layers(first, second)
    comparer = Comparer(first, second, layers, threads=threads, as_written=as_written)
    comparer.look(images)
    found = [next(_departing(layer, first, second, comparer), None) for layer in layers]
    departing = dict(one for one in found if one is not None)
    logits, leaving = first.outputs[0], next(iter(departing), None)
    entering = [name for name in comparer.pieces[leaving].takes if name in comparer.seen] if leaving else []
    marks = list(dict.fromkeys([logits, *([leaving] if leaving else ()), *entering]))
    errors = errors_in_file(first, second, marks, images, threads=threads, as_written=as_written)
    if leaving:
        before = min((errors[name] for name in entering), default=EXACT_DB)
        departing[leaving] = replace(departing[leaving], entering_db=before, leaving_db=errors[leaving])
    return Comparison(
        departures=tuple(departing.values()), layers=len(layers), images=len(images), logits_db=errors[logits]
    )


def _departing(layer: Layer, reference: Graph, suspect: Graph, comparer: Comparer) -> Iterator[tuple[str, Departure]]:
    """The tensors at cuts that depart in a layer, first to last, and how."""
    for name in layer.made:
        if reference.types[name] not in FLOATS:
            continue  # a size that is computed on the way
        part, seen, maker = comparer.pieces[name], comparer.seen[name], reference.makers[name]
        coarse, steps = _coarsest(part, suspect, comparer)
        verdict = _verdict(part, seen, steps)
        if verdict is not None:
            kind, limit = verdict
            yield (
                name,
                Departure(
                    layer=layer.name,
                    node=maker.name or name,
                    operator=maker.op_type,
                    tensor=coarse if kind == "scale" else seen.broken or name,
                    kind=kind,
                    own_db=-EXACT_DB if seen.broken else decibels(seen.signal, seen.noise),
                    limit_db=limit,
                    largest=seen.largest if seen.broken in ("", name) else None,
                    steps_ratio=steps if kind == "scale" else None,
                ),
            )


def _verdict(part: Piece, seen: Seen, steps: float) -> tuple[Kind, float | None] | None:
    """How a piece departs, and the ratio that would do; None where it does not, or got no number."""
    if seen.is_unfed:
        return None
    if seen.broken:
        return ("not finite" if seen.has_nan else "overflow"), None
    if part.has_quantized_weights and decibels(seen.signal, seen.weights_noise) < WEIGHTS_DB:
        return "weights", WEIGHTS_DB
    if steps > MOST_STEPS:
        return "scale", None
    limit = FP16_DB if part.is_half else FP32_DB
    if part.has_codes:
        limit = PRODUCT_DB if part.has_quantized_weights else ATTENTION_DB
    if decibels(seen.signal, seen.noise) < limit:
        return ("weights" if part.has_weights and not part.has_codes else "error"), limit
    return None


def _coarsest(part: Piece, suspect: Graph, comparer: Comparer) -> tuple[str, float]:
    """Of what is quantized to integers in a piece, that with the largest scale for its values, and how much too large.

    A scale is as large as need be where the largest value gets the largest code.
    """
    found = [("", 0.0)]
    for node in part.rounded:
        largest = comparer.largest_rounded.get(node.input[0], 0.0)
        zero = suspect.constants.get(node.input[2]) if len(node.input) > 2 else None
        if zero is not None and zero.data_type in LARGEST_CODE and node.input[1] in suspect.constants and largest:
            code = LARGEST_CODE[zero.data_type]
            found.append((node.input[0], float(suspect.value_of(node.input[1]).max()) * code / largest))
    return max(found, key=lambda pair: pair[1])
