"""FP16 and BF16: an ONNX file whose weights and products are in half precision, by casts in the graph.

Of a quantized file it is what lies around the quantized products, scales included. Networks of TensorRT are strongly
typed, so precision is what the file says. What goes in and out stays in FP32, and so do LayerNormalization and Softmax,
whose sums need it, and operators that ONNX does not define for the type (Conv in BF16 below opset 22). ONNX Runtime's
CPU provider computes FP16 in FP32 and has no BF16 kernels (Add, MatMul, Expand); OpenVINO reads both.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from calibrate.files import open_session
from flora.errors import InputError, near_matches
from flora.onnxfiles import save_onnx

PRECISIONS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
# What ONNX's own tables of operators call them.
TYPE_NAMES = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}
SINGLE = ("LayerNormalization", "Softmax", "Cast")
SCALED = ("QuantizeLinear", "DequantizeLinear")


class BeyondRangeError(InputError):
    """A model holds or gives more than a precision has numbers for."""


def half_onnx(source: Path, out: Path, precision: str) -> None:
    """Write the ONNX file `out`: `source`, whose floats are in FP32, in a `precision` of `PRECISIONS`.

    `BeyondRangeError` where a weight is beyond the range of the precision.
    """
    if precision not in PRECISIONS:
        hint = near_matches(precision, PRECISIONS)
        raise InputError(f"{precision!r} is no half precision; give one of {', '.join(PRECISIONS)}.{hint}")
    model, floats = onnx.load(source), _float_values(source)
    graph, opsets = model.graph, {entry.domain: entry.version for entry in model.opset_import}
    halved = [_can_be_half(node, floats, opsets.get(node.domain, 1), precision) for node in graph.node]
    read = {name for node, half in zip(graph.node, halved, strict=True) if half for name in node.input}
    made = {name for node, half in zip(graph.node, halved, strict=True) if half for name in node.output}
    halves = floats & (made | (read & {tensor.name for tensor in graph.initializer}))
    scales = {node.input[1] for node in graph.node if node.op_type in SCALED}
    for tensor in graph.initializer:
        if tensor.name in halves:
            tensor.CopyFrom(_rounded(tensor, precision, source, above_zero=tensor.name in scales))
    nodes = list(_with_casts(graph, halved, floats, halves, precision))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    save_onnx(model, out)


def check_fits_fp16(source: Path, batches: Iterable[np.ndarray], *, threads: int | None = None) -> None:
    """Raise `BeyondRangeError` naming the first node of `source`, in FP32, that gives more than FP16 holds on an image.

    To be asked before FP16 is trusted: ONNX Runtime's CPU provider runs FP16 files in FP32, so nothing overflows there.
    """
    model, floats = onnx.load(source, load_external_data=False), _float_values(source)
    nodes = [node for node in model.graph.node if node.output[0] in floats]
    sizes = [f"{node.output[0]}_largest" for node in nodes]
    for node, size in zip(nodes, sizes, strict=True):
        model.graph.node.append(helper.make_node("Abs", [node.output[0]], [f"{size}_of"]))
        model.graph.node.append(helper.make_node("ReduceMax", [f"{size}_of"], [size], keepdims=0))
        model.graph.output.append(helper.make_tensor_value_info(size, TensorProto.FLOAT, []))
    session = open_session(model.SerializeToString(), threads, weights=Path(source).parent)
    for batch in batches:
        for node, largest in zip(nodes, session.run(sizes, {model.graph.input[0].name: batch}), strict=True):
            if not largest <= np.finfo(np.float16).max:
                raise BeyondRangeError(
                    f"{node.name} in {source} reaches {largest:.4g} on an image, beyond the range of fp16; "
                    "use bf16, or keep the model in FP32."
                )


def _float_values(source: Path) -> set[str]:
    """The names of all values in FP32."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(source, load_external_data=False)).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    of_nodes = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return of_nodes | {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}


def _can_be_half(node: NodeProto, floats: Collection[str], opset: int, precision: str) -> bool:
    """Whether the node reads floats, and ONNX lets all that it reads and gives be in half precision."""
    if node.op_type in SINGLE or not any(name in floats for name in node.input):
        return False
    if not onnx.defs.has(node.op_type, opset, node.domain):
        return False
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    return all(
        TYPE_NAMES[precision] in parameters[min(i, len(parameters) - 1)].types
        for names, parameters in ((node.input, schema.inputs), (node.output, schema.outputs))
        for i, name in enumerate(names)
        if name in floats
    )


def _rounded(tensor: TensorProto, precision: str, source: Path, *, above_zero: bool) -> TensorProto:
    """The nearest values of the precision; `above_zero`, its smallest one for what is nearer to zero."""
    values, dtype = numpy_helper.to_array(tensor), helper.tensor_dtype_to_np_dtype(PRECISIONS[precision])
    if above_zero:
        values = np.maximum(values, float(ml_dtypes.finfo(dtype).smallest_subnormal))
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype)
    if not np.isfinite(rounded.astype(np.float32)[np.isfinite(values)]).all():
        raise BeyondRangeError(
            f"{tensor.name} in {source} holds {np.abs(values).max():.4g}, beyond the range of {precision}; "
            "use bf16, or keep the model in FP32."
        )
    return numpy_helper.from_array(rounded, tensor.name)


def _with_casts(
    graph: GraphProto, halved: Sequence[bool], floats: Collection[str], halves: Collection[str], precision: str
) -> Iterator[NodeProto]:
    """The nodes of `graph`, changed, each after the casts that it is the first to need.

    A value is in half precision if it is one of `halves`, and a node wants its floats in it if it is `halved`.
    """
    inner = {value.name: f"{value.name}_{precision}" for value in graph.output if value.name in halves}
    cast = set()
    for node, half in zip(graph.node, halved, strict=True):
        for i, name in enumerate(node.input):
            node.input[i] = inner.get(name, name)
            if name in floats and (name in halves) != half:
                wanted = f"{name}_as_{precision if half else 'fp32'}"
                if wanted not in cast:
                    yield _cast(node.input[i], wanted, PRECISIONS[precision] if half else TensorProto.FLOAT)
                cast.add(wanted)
                node.input[i] = wanted
        for i, name in enumerate(node.output):
            node.output[i] = inner.get(name, name)
        yield node
    for name, within in inner.items():
        yield _cast(within, name, TensorProto.FLOAT)


def _cast(name: str, wanted: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [name], [wanted], name=f"cast_of_{name}_to_{wanted}", to=to)
