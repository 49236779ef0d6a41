"""What a runtime really ran of a model, kernel by kernel: which hold products, what those are computed in, how long.

A product is a matrix product or a convolution. What it is computed in is read from the type of what goes into it, since
files say what was wished for: ONNX Runtime's CPU provider computes an FP16 file in FP32, and products between quantize
nodes in FP32 where it knows no better kernel.
"""

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from export.runners import PROVIDER_OPTIONS, openvino_config
from flora.onnxsessions import onnxruntime_module, session_options

# The words of ONNX Runtime, OpenVINO and TensorRT; what is not here keeps the runtime's own.
PRECISIONS = {
    "fp32": ("float", "f32", "fp32"),
    "fp16": ("float16", "f16", "fp16", "half"),
    "bf16": ("bfloat16", "bf16"),
    "int8": ("int8", "uint8", "i8", "u8"),
    "fp8": ("fp8", "f8e4m3", "f8e5m2", "float8e4m3fn", "float8e5m2"),
}
PRECISION_OF_WORD = {word: precision for precision, words in PRECISIONS.items() for word in words}
RUNS = 5

# Any operator of ONNX Runtime that multiplies; each release fuses more of them (QLinearMatMul, NhwcFusedConv, ...).
ORT_PRODUCT = re.compile(r"MatMul|Gemm(?!a)|Conv(?!ert)|Attention|Einsum")
ORT_QUANTIZES_WITHIN = ("DynamicQuantizeMatMul",)
ORT_CONVERSION = re.compile(r"^(Cast|ReorderInput|ReorderOutput|(Dynamic|De)?[Qq]uantizeLinear)$")
KERNEL_TIME = "_kernel_time"
OPENVINO_PRODUCTS = ("FullyConnected", "MatMul", "Convolution", "Deconvolution", "ScaledDotProductAttention")
MEAN_TIME = "execTimeMcs"
OPENVINO_CONVERSIONS = ("Reorder", "Convert", "FakeQuantize")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One thing that was run: `products` is how many it holds, `weight` its microseconds, or 1 where none are known.

    `nodes` are those of the file that it was made of, where the runtime says so.
    """

    precision: str
    weight: float
    products: int = 0
    converts: bool = False
    nodes: frozenset[str] = frozenset()


def kernels_of_onnxruntime(path: Path, provider: str, images: np.ndarray, *, threads: int | None) -> list[Kernel]:
    """Each node of the optimized graph with the median of its times; `images` are run a few times."""
    return [_ort_kernel(runs) for runs in profile_of_onnxruntime(path, provider, images, threads=threads)]


def profile_of_onnxruntime(
    path: Path, provider: str, images: np.ndarray, *, threads: int | None, optimized: Path | None = None
) -> list[list[dict[str, Any]]]:
    """What ONNX Runtime noted of each node, in the order they ran: an event for each run, of which the first warms up.

    The graph that it ran, which is not the file's, goes to the file `optimized`, its weights to another one beside it.
    """
    options = session_options(threads)
    options.enable_profiling = True
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimized.name}.data"
        )
    with tempfile.TemporaryDirectory() as scratch:
        options.profile_file_prefix = str(Path(scratch) / "profile")
        session = onnxruntime_module().InferenceSession(
            path, options, providers=[(provider, PROVIDER_OPTIONS.get(provider, {}))]
        )
        for _ in range(1 + RUNS):
            session.run(None, {session.get_inputs()[0].name: images})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(KERNEL_TIME):
            nodes.setdefault((event["args"]["node_index"], event["name"]), []).append(event)
    return list(nodes.values())


def _ort_kernel(runs: list[dict[str, Any]]) -> Kernel:
    operator = runs[0]["args"]["op_name"]
    inputs = [word for shapes in runs[0]["args"]["input_type_shape"] for word in shapes]
    within = operator in ORT_QUANTIZES_WITHIN
    return Kernel(
        precision="int8" if within else precision_of(inputs),
        weight=_microseconds(median(run["dur"] for run in runs[1:])),
        products=int(bool(ORT_PRODUCT.search(operator))),
        converts=bool(ORT_CONVERSION.match(operator)),
        nodes=frozenset((runs[0]["name"].removesuffix("_kernel_time"),)),
    )


def kernels_of_openvino(path: Path, images: np.ndarray, *, threads: int | None) -> list[Kernel]:
    """Each executed node of the graph that OpenVINO made of the file, with the mean of its times."""
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    multiplying = {op.get_friendly_name() for op in model.get_ops() if op.get_type_name() in OPENVINO_PRODUCTS}
    compiled = core.compile_model(model, "CPU", {**openvino_config("fp32", threads), "PERF_COUNT": "YES"})
    request = compiled.create_infer_request()
    request.infer([images])
    first = _executed(compiled)
    for _ in range(RUNS):
        request.infer([images])
    # OpenVINO tells means since the beginning; the first run, in which weights are laid out anew, is taken out of them.
    return [
        _openvino_kernel(
            facts, multiplying, (float(facts[MEAN_TIME]) * (1 + RUNS) - float(first[name][MEAN_TIME])) / RUNS
        )
        for name, facts in _executed(compiled).items()
    ]


def _executed(compiled: Any) -> dict[str, dict[str, str]]:
    """What OpenVINO tells of each node that it executed, by name."""
    told = {op.get_friendly_name(): op.get_rt_info() for op in compiled.get_runtime_model().get_ops()}
    facts = {name: {key: values[key].astype(str) for key in values} for name, values in told.items()}
    return {name: values for name, values in facts.items() if values[MEAN_TIME] != "not_executed"}


def _openvino_kernel(facts: dict[str, str], multiplying: set[str], microseconds: float) -> Kernel:
    kind = facts["layerType"]
    # The products of fused attention are in a subgraph, which lists the nodes that it was made of.
    fused = len(multiplying & set(facts["originalLayersNames"].split(","))) if kind == "Subgraph" else 0
    return Kernel(
        precision=precision_of([facts["runtimePrecision"]]),
        weight=_microseconds(microseconds),
        products=1 if kind in OPENVINO_PRODUCTS else fused,
        converts=kind in OPENVINO_CONVERSIONS,
        nodes=frozenset(facts["originalLayersNames"].split(",")),
    )


def precision_of(inputs: list[str]) -> str:
    """Precision of the first input, which is that of the activations in all products here."""
    known = [PRECISION_OF_WORD[word] for word in inputs if word in PRECISION_OF_WORD]
    return known[0] if known else ", ".join(inputs[:1])


def _microseconds(measured: float) -> float:
    """At least the clock's tick: what was run took some time."""
    return max(1.0, float(measured))
