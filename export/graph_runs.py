"""ONNX graphs in memory as functions on ONNX Runtime's CPU provider, and the error of one against another."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from onnx import ModelProto
from onnx.helper import make_empty_tensor_value_info

from export.cuts import Graph
from export.runners import CPU
from flora.errors import InputError
from flora.onnxsessions import onnxruntime_failures, onnxruntime_module, session_options

# Said where there is no error, and with the other sign where there is no number.
EXACT_DB = 200.0

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def run_of(model: ModelProto, graph: Graph, threads: int | None, *, as_written: bool = False) -> Run:
    """What computes all outputs of `model`, by name, out of its inputs; weights lie beside the file of `graph`.

    `InputError` where ONNX Runtime cannot run it.
    """
    options = session_options(threads, as_written=as_written)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.path.parent))
    gives, takes = [value.name for value in model.graph.output], [value.name for value in model.graph.input]

    def explain(error: Exception) -> InputError:
        return InputError(f"{graph.path} cannot be run here ({error}); export or copy it again.")

    try:
        session = onnxruntime_module().InferenceSession(model.SerializeToString(), options, providers=[CPU])
    except onnxruntime_failures() as error:
        raise explain(error) from error

    def run(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return dict(zip(gives, session.run(gives, {name: values[name] for name in takes}), strict=True))
        except onnxruntime_failures() as error:
            raise explain(error) from error

    return run


def errors_in_file(
    reference: Graph,
    suspect: Graph,
    names: Sequence[str],
    images: np.ndarray,
    *,
    threads: int | None,
    as_written: bool,
) -> dict[str, float]:
    """Signal to noise of tensors where both files are run as they are."""
    first, second = (_marked(graph, names) for graph in (reference, suspect))
    expect, find = run_of(first, reference, threads), run_of(second, suspect, threads, as_written=as_written)
    sums = {name: np.zeros(2) for name in names}
    for i in range(len(images)):
        expected, found = (run({reference.input: images[i : i + 1]}) for run in (expect, find))
        for name in names:
            if expected[name].dtype.kind == "f":
                sums[name] += power(expected[name]), power(expected[name] - found[name])
    return {name: decibels(*sums[name]) for name in names}


def _marked(graph: Graph, names: Sequence[str]) -> ModelProto:
    """The whole graph with these tensors among its outputs."""
    model = ModelProto()
    model.CopyFrom(graph.model)
    model.graph.output.extend(make_empty_tensor_value_info(name) for name in names if name not in graph.outputs)
    return model


def power(values: np.ndarray) -> float:
    """The sum of squares; no number where there is none among the values."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.square(values, dtype=np.float64).sum())


def decibels(signal: float, noise: float) -> float:
    """The ratio of two powers, between plus and minus `EXACT_DB`; no number counts as no signal."""
    if not math.isfinite(noise):
        return -EXACT_DB
    if not noise:
        return EXACT_DB
    return max(-EXACT_DB, min(EXACT_DB, 10 * math.log10(signal / noise))) if signal else -EXACT_DB
