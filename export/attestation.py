"""What precision the products of an artefact are really computed in, and what is required of that.

An INT8 file holds weights in bytes, and that is all that its name promises: whether a runtime multiplies in INT8 shows
in what it ran.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from export.attention import attention_blocks, fused_blocks
from export.inspector import kernels_of_engine
from export.kernels import PRECISIONS, Kernel, kernels_of_onnxruntime, kernels_of_openvino
from export.runtimes import RUNTIMES, open_runner
from export.tensorrt_runner import TensorRtRunner
from flora.errors import InputError, near_matches

Source = Literal["profile of ONNX Runtime", "execution graph of OpenVINO", "engine inspector of TensorRT"]
FORM = "give a precision and the least share of products in it, such as int8>=80%; several with commas"


class Attestation(BaseModel):
    """By precision, the share of the time in products (of their number, where no times are known), and their number.

    A product is a matrix product or a convolution, those of attention included; a kernel that fuses attention counts
    whole. `conversion_share` is what quantizing, casting and reordering take, of all that was run. `fused_attention` is
    how many of the `attention_blocks` one kernel runs whole, unknown where the runtime does not say what it fused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Source
    weighted_by: Literal["time", "count"]
    shares: dict[str, float]
    products: dict[str, int]
    conversion_share: float
    attention_blocks: int | None = None
    fused_attention: int | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shares.keys() != self.products.keys() or not math.isclose(sum(self.shares.values()), 1):
            raise ValueError(f"shares must sum to 1, of the precisions {list(self.products)}; got {self.shares}")
        if self.fused_attention is not None and not 0 <= self.fused_attention <= (self.attention_blocks or 0):
            raise ValueError(f"{self.fused_attention} of {self.attention_blocks} attention blocks cannot be fused")
        return self


def attest(path: Path, runtime: str, images: np.ndarray, *, threads: int | None = None) -> Attestation:
    """What the products of the ONNX file `path` are computed in on `runtime`, seen while it runs `images` [B, C, H, W].

    On a GPU products are counted, since ONNX Runtime times there how long it takes to ask for one. `InputError` where
    the file holds none.
    """
    with open_runner(runtime, path, threads=threads) as runner:
        runner(images)  # what cannot be run is refused here, in the runner's words
        provider = runner.provider
    if runtime == "openvino":
        kernels = kernels_of_openvino(path, images, threads=threads)
        return _attestation("execution graph of OpenVINO", "time", kernels, str(path), attention_blocks(path))
    kernels = kernels_of_onnxruntime(path, provider, images, threads=threads)
    weighted_by: Literal["time", "count"] = "count" if RUNTIMES[runtime].on_gpu else "time"
    # Where it fuses attention, ONNX Runtime does not say what of.
    blocks = None if any("Attention" in name for kernel in kernels for name in kernel.nodes) else attention_blocks(path)
    return _attestation("profile of ONNX Runtime", weighted_by, kernels, str(path), blocks)


def attest_engine(path: Path, *, source: Path | None = None, trusted: bool = False) -> Attestation:
    """What the products of TensorRT's engine `path`, for the GPU that is present, are computed in.

    By the ONNX file `source` that it was built from, its attention blocks are known.

    The engine must have been built with detailed verbosity, else `InputError`; one that brings code of its own must be
    `trusted`.
    """
    with TensorRtRunner(path, trusted=trusted) as runner:
        return attest_inspected(runner.inspected(), str(path), source)


def attest_inspected(inspector_json: str, what: str, source: Path | None = None) -> Attestation:
    """The same from the JSON of the engine inspector; `what` is called so in errors."""
    blocks = None if source is None else attention_blocks(source)
    return _attestation("engine inspector of TensorRT", "count", kernels_of_engine(inspector_json), what, blocks)


def _attestation(
    source: Source,
    weighted_by: Literal["time", "count"],
    kernels: Sequence[Kernel],
    what: str,
    blocks: Sequence[frozenset[str]] | None,
) -> Attestation:
    weights: dict[str, float] = defaultdict(float)
    products: dict[str, int] = defaultdict(int)
    everything = conversions = 0.0
    for kernel in kernels:
        weight = kernel.weight if weighted_by == "time" else max(1, kernel.products)
        everything += weight
        conversions += weight * kernel.converts
        if kernel.products:
            weights[kernel.precision] += weight
            products[kernel.precision] += kernel.products
    if not products:
        raise InputError(f"{what} shows no matrix product or convolution, so there is nothing to attest.")
    total = sum(weights.values())
    told = blocks is not None and any(kernel.nodes for kernel in kernels)
    return Attestation(
        source=source,
        weighted_by=weighted_by,
        shares={precision: weight / total for precision, weight in weights.items()},
        products=products,
        conversion_share=conversions / everything,
        attention_blocks=None if blocks is None else len(blocks),
        fused_attention=fused_blocks(blocks, (kernel.nodes for kernel in kernels))
        if told and blocks is not None
        else None,
    )


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """The least share of products in each precision named."""

    least: Mapping[str, float]

    def __post_init__(self) -> None:
        for precision, share in self.least.items():
            if precision not in PRECISIONS:
                hint = near_matches(precision, PRECISIONS)
                raise InputError(f"{precision!r} is no precision; give one of {', '.join(PRECISIONS)}.{hint}")
            if not 0 <= share <= 1:
                raise InputError(f"A share is between 0 and 100 %, got {_percent(share)} of {precision}.")
        if sum(self.least.values()) > 1 + 1e-9:
            raise InputError(f"Shares of {', '.join(self.least)} sum to more than 100 %; ask for less.")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `int8>=80%`, several with commas; `InputError` where it is something else."""
        least: dict[str, float] = {}
        for part in text.split(","):
            found = re.fullmatch(r"\s*(\w+)\s*>=\s*(\d+\.?\d*)\s*%\s*", part)
            if found is None:
                raise InputError(f"{part.strip()!r} is no requirement; {FORM}.")
            precision = found[1].lower()
            if precision in least:
                raise InputError(f"{text!r} names {precision} twice; give one share of it.")
            least[precision] = float(found[2]) / 100
        return cls(least=least)

    def unmet(self, attestation: Attestation) -> str | None:
        """A sentence for what falls short, or nothing."""
        of = "the time in products" if attestation.weighted_by == "time" else "the products"
        short = [
            f"{precision} takes {_percent(share)} of {of}, {_percent(least)} are required"
            for precision, least in self.least.items()
            if (share := attestation.shares.get(precision, 0.0)) < least - 1e-9
        ]
        return "; ".join(short) or None


def unmet(require: str | None, precision: str, attestation: Attestation | None) -> list[str]:
    """What `require` asks of what computes in `precision` and was seen not to be so; nothing where nobody looked."""
    least = Requirement.parse(require).least.get(precision) if require else None
    if least is None or attestation is None:
        return []
    sentence = Requirement(least={precision: least}).unmet(attestation)
    return [sentence] if sentence else []


def _percent(share: float) -> str:
    """Rounded down, so that what falls short never reads as enough."""
    return f"{math.floor(share * 1000 + 1e-6) / 10:g} %"
