"""What a latency table times: one layer among its neighbours, and whole models, at any ranks and with random weights.

Runtimes that load ONNX files, and TensorRT, get graphs; torch gets modules.
"""

import copy
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

import onnx
import torch
import torch.nn.functional as F
from onnx import ModelProto
from torch import Tensor, nn

from calibrate.ranges import unit_ranges
from calibrate.static import quantize_onnx
from export.engines import EngineSpec, engine_from_onnx
from export.graphs import RESIDUAL, graph_at_ranks, site_graph
from export.runners import Runner
from export.runtimes import TENSORRT, TORCH_CUDA, open_runner
from export.tensorrt_runner import TensorRtRunner
from export.torch_runner import TorchRunner
from flora.lowrank.materialize import pair
from flora.lowrank.pivot import PivotedLinear
from flora.ranks.cost import LayerShape, ModelCost, Rank
from flora.ranks.latency import Site

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Gelu": F.gelu,
    "Relu": F.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
}


class Subjects(Protocol):
    """Opens what is timed; a runner is to be given back."""

    def layer(self, site: Site, rank: Rank, batch: int, precision: str, *, pivoted: bool = False) -> Runner:
        """A runner of [batch, tokens, in_features]."""
        ...

    def model(self, ranks: Mapping[str, Rank], pivoted: Collection[str], batch: int, precision: str) -> Runner:
        """A runner of images [batch, C, H, W]."""
        ...


class Graphs:
    """ONNX graphs made from that of the dense model, in files of the folder `work` that are written anew each time."""

    def __init__(self, dense: ModelProto, cost: ModelCost, work: Path, *, runtime: str, threads: int) -> None:
        self._dense, self._cost, self._work = dense, cost, work
        self._runtime, self._threads = runtime, threads

    def layer(self, site: Site, rank: Rank, batch: int, precision: str, *, pivoted: bool = False) -> Runner:
        """A runner of [batch, tokens, in_features]."""
        opset, ir_version = self._dense.opset_import[0].version, self._dense.ir_version
        path = self._work / "layer.onnx"
        site_graph(site, rank, batch, path, pivoted=pivoted, opset=opset, ir_version=ir_version)
        return self._open(path, batch, precision)

    def model(self, ranks: Mapping[str, Rank], pivoted: Collection[str], batch: int, precision: str) -> Runner:
        """A runner of images [batch, C, H, W]."""
        path = self._work / "model.onnx"
        graph_at_ranks(self._dense, self._cost.shapes, ranks, path, pivoted)
        return self._open(path, batch, precision)

    def _open(self, path: Path, batch: int, precision: str) -> Runner:
        if precision == "int8":
            _quantize(path)
            precision = "fp32"  # of what is left
        if self._runtime != TENSORRT:
            return open_runner(self._runtime, path, threads=self._threads, precision=precision)
        engine = path.with_suffix(".engine")
        engine_from_onnx(path, engine, EngineSpec(backend=TENSORRT, min_batch=batch, opt_batch=batch, max_batch=batch))
        return TensorRtRunner(engine)


def _quantize(path: Path) -> None:
    """Put the file in INT8. Its batch becomes open, as in a model's file: where it is fixed, ONNX Runtime makes a
    product and its bias one in FP32 before it looks for what to compute in INT8."""
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, path)
    quantize_onnx(path, path, unit_ranges(path))


class Modules:
    """torch modules, on the CPU or a GPU."""

    def __init__(self, dense: nn.Module, cost: ModelCost, *, runtime: str) -> None:
        self._dense, self._cost = dense, cost
        self._device = "cuda" if runtime == TORCH_CUDA else "cpu"

    def layer(self, site: Site, rank: Rank, batch: int, precision: str, *, pivoted: bool = False) -> Runner:
        """A runner of [batch, tokens, in_features]."""
        return self._open(_SiteModule(site, rank, batch, pivoted=pivoted), precision)

    def model(self, ranks: Mapping[str, Rank], pivoted: Collection[str], batch: int, precision: str) -> Runner:
        """A runner of images [batch, C, H, W]."""
        replaced = {
            id(self._dense.get_submodule(name)): _layer(
                self._cost.shapes[name],
                rank,
                bias=self._dense.get_submodule(name).bias is not None,
                pivoted=name in pivoted,
            )
            for name, rank in ranks.items()
            if self._cost.shapes[name].is_factored(rank, pivoted=name in pivoted)
        }
        # deepcopy takes what its memo already holds.
        return self._open(copy.deepcopy(self._dense, replaced), precision)

    def _open(self, module: nn.Module, precision: str) -> Runner:
        return TorchRunner(module.to(DTYPES[precision]), name=precision, device=self._device)


class _SiteModule(nn.Module):
    """A linear layer and the operators of its site."""

    def __init__(self, site: Site, rank: Rank, batch: int, *, pivoted: bool) -> None:
        super().__init__()
        # A bias is part of torch's product.
        bias = site.after[:1] == ("Add",)
        self.linear = _layer(site, rank, bias=bias, pivoted=pivoted)
        self.after = site.after[bias:]
        for i, operator in enumerate(self.after):
            if operator in ("Add", "Mul", RESIDUAL):
                like = (batch, site.tokens) if operator == RESIDUAL else ()
                self.register_buffer(f"c{i}", torch.full((*like, site.out_features), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, in] -> [batch, tokens, out]."""
        y = self.linear(x)
        for i, operator in enumerate(self.after):
            if operator in FUNCTIONS:
                y = FUNCTIONS[operator](y)
            else:
                constant = self.get_buffer(f"c{i}")
                y = y * constant if operator == "Mul" else y + constant
        return y


def _layer(shape: Site | LayerShape, rank: Rank, *, bias: bool, pivoted: bool) -> nn.Module:
    """A linear layer of this shape, dense, as two factors or pivoted; torch's own random weights."""
    wide, high = shape.in_features, shape.out_features
    if rank == "dense":
        return nn.Linear(wide, high, bias=bias)
    down, up = nn.Linear(wide, rank, bias=False), nn.Linear(rank, high, bias=bias)
    if not pivoted:
        return pair(down, up)
    rest = up.weight.detach()[rank:].clone()
    return PivotedLinear(down.weight.detach(), rest[:0], rest, None if up.bias is None else up.bias.detach())
