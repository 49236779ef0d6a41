"""Where the time of a model goes, part by part: qkv, attention, LayerNorm and the like, over all blocks.

ONNX Runtime fuses and reorders what the file holds, so its profile is of other nodes than the file's. A node belongs to
the layer whose weights it multiplies with; else to the part that its output came from in the file, or that the next
node does; else to `other`.
"""

import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto

from export.kernels import KERNEL_TIME, profile_of_onnxruntime
from export.runners import CPU
from flora.onnxfiles import layer_named, scopes_of

PATCHES, NORM, ATTENTION, ACTIVATION, HEAD, OTHER = (
    "patch embedding",
    "LayerNorm",
    "attention",
    "activation",
    "head",
    "other",
)
ORDER = (PATCHES, NORM, "qkv", ATTENTION, "proj", "fc1", ACTIVATION, "fc2", "reduction")
LAST = (HEAD, OTHER)
PRODUCTS = ("MatMul", "Gemm", "Conv")


def part_of(module: str, layers: Collection[str]) -> str:
    """The part that a module of a timm model belongs to, by its name; `layers` are those that hold weights."""
    name = layer_named(module)
    first, last = name.split(".")[0], name.rsplit(".", 1)[-1]
    if first == "patch_embed":
        return PATCHES
    if first.startswith("head"):
        return HEAD
    if name and name in layers:
        return last
    if "norm" in last:
        return NORM
    if last == "act":
        return ACTIVATION
    return ATTENTION if "attn" in name.split(".") else OTHER


def in_order(parts: Collection[str]) -> list[str]:
    """Parts in the order in which a block computes them, those of no block at the ends."""
    unknown = [part for part in parts if part not in (*ORDER, *LAST)]
    return [part for part in (*ORDER, *unknown, *LAST) if part in parts]


def time_shares(path: Path, images: np.ndarray, *, threads: int | None) -> dict[str, float]:
    """The share of ONNX Runtime's time on the CPU in each part of the ONNX file `path`, running `images` [B, C, H, W].

    Nodes belong to parts by the names of modules that torch's exporter wrote to the file. Of each the fastest of a few
    runs counts, which nothing else on the machine disturbed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        optimized = Path(scratch) / "optimized.onnx"
        profile = profile_of_onnxruntime(path, CPU, images, threads=threads, optimized=optimized)
        parts = _parts_of_optimized(
            onnx.load(path, load_external_data=False), onnx.load(optimized, load_external_data=False)
        )
    spent: Counter[str] = Counter()
    for runs in profile:
        waiting = parts[runs[0]["name"].removesuffix(KERNEL_TIME)]
        # Nodes of one name run in the order in which they stand in the graph.
        spent[waiting.pop(0) if waiting else OTHER] += min(run["dur"] for run in runs[1:])
    total = sum(spent.values())
    return {part: spent[part] / total for part in in_order(spent)}


def _parts_of_optimized(file: ModelProto, optimized: ModelProto) -> defaultdict[str, list[str]]:
    """The part of each node of the optimized graph, by the names of nodes, which need not differ."""
    of_weights, of_outputs = _parts_of_file(file)
    consumer = {name: node for node in reversed(optimized.graph.node) for name in node.input}

    def candidates(node: NodeProto | None) -> Iterator[str]:
        while node is not None:
            yield from (of_weights[name] for name in node.input if name in of_weights)
            yield from (of_outputs[name] for name in node.output if name in of_outputs)
            node = next((consumer[name] for name in node.output if name in consumer), None)

    parts: defaultdict[str, list[str]] = defaultdict(list)
    for node in optimized.graph.node:
        parts[node.name].append(next(candidates(node), OTHER))
    return parts


def _parts_of_file(file: ModelProto) -> tuple[dict[str, str], dict[str, str]]:
    """The part of each weight of a product, and of each output of a node."""
    constants = {tensor.name for tensor in file.graph.initializer}
    nodes = [(node, _module_of(node)) for node in file.graph.node]
    weights = {
        node.input[1]: module for node, module in nodes if node.op_type in PRODUCTS and node.input[1] in constants
    }
    layers = {layer_named(module) for module in weights.values()}
    of_weights = {name: part_of(module, layers) for name, module in weights.items()}
    return of_weights, {name: part_of(module, layers) for node, module in nodes for name in node.output}


def _module_of(node: NodeProto) -> str:
    """The innermost module that a node is of."""
    return (scopes_of(node)[-2:] or [""])[0]
