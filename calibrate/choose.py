"""How to calibrate, chosen by the error that is measured.

First the bits of weights, which depend on the processor's kernels, then the method for ranges, then the basis between
factors.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibrate.basis import has_factors, rewrite_basis
from calibrate.files import check_not_quantized
from calibrate.ranges import METHODS, Ranges, measure_ranges
from calibrate.static import quantize_onnx
from flora.errors import FloraError

PLAIN = "plain"
# Balancing alone was worth less than either of these on every model.
TRIED = ("rotated", "balanced+rotated")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One way to calibrate: `source` is the model in single precision, in this basis, and `quantized` its INT8 file."""

    method: str
    basis: str
    weight_bits: int
    sqnr_db: float
    source: Path
    quantized: Path

    @property
    def name(self) -> str:
        return _name(self.method, self.basis, self.weight_bits)


def _name(method: str, basis: str, weight_bits: int) -> str:
    return f"{method}, {basis} basis, {weight_bits}-bit weights"


def quantize_best(
    source: Path,
    folder: Path,
    batches: Iterable[np.ndarray],
    images: int,
    *,
    sqnr_db: Callable[[Path], float],
    weight_bits: Sequence[int] = (8, 7),
    threads: int | None = None,
    on_trial: Callable[[str], None] = lambda name: None,
) -> list[Trial]:
    """INT8 files of `source` in `folder`, the one with the least error first.

    `batches` [B, C, H, W] of the calibration images, so many, are gone through for each trial. `sqnr_db` measures a
    file on other images, on the runtime that it is for: kernels round in their own ways.
    """
    check_not_quantized(source)

    def trial(method: str, basis: str, weight_bits: int, model: Path) -> Trial:
        on_trial(_name(method, basis, weight_bits))
        if (method, basis) not in measured:
            measured[method, basis] = measure_ranges(model, batches, method, threads=threads)
        ranges = measured[method, basis]
        if ranges.images != images:
            raise FloraError(f"Ranges were measured on {ranges.images} of {images} calibration images.")
        quantized = folder / f"{method}-{basis}-{weight_bits}.onnx"
        quantize_onnx(model, quantized, ranges, weight_bits=weight_bits)
        return Trial(
            method=method,
            basis=basis,
            weight_bits=weight_bits,
            sqnr_db=sqnr_db(quantized),
            source=model,
            quantized=quantized,
        )

    measured: dict[tuple[str, str], Ranges] = {}
    first, *others = METHODS
    trials = [trial(first, PLAIN, bits, source) for bits in weight_bits]
    bits = max(trials, key=_score).weight_bits
    trials += [trial(method, PLAIN, bits, source) for method in others]
    best = max(trials, key=_score)
    for basis in TRIED if has_factors(source) else ():
        rewritten = folder / f"source-{basis}.onnx"
        rewrite_basis(source, rewritten, batches, basis, threads=threads)
        trials.append(trial(best.method, basis, bits, rewritten))
    return sorted(trials, key=_score, reverse=True)


def _score(trial: Trial) -> float:
    return trial.sqnr_db
