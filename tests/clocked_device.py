"""A device for tests of latency: a real runtime on a clock on which products take time by their size."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from torch import nn

from export.runners import Runner
from flora.lowrank.pivot import PivotedLinear
from flora.pipeline.subjects import Graphs, Modules

NS_A_MAC = 40


class ClockedDevice:
    """A device on which a model takes 1 ms and so many nanoseconds for each weight of its products and each image."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns, self.opened, self.speed = 0, 0, 1.0
        monkeypatch.setattr(time, "perf_counter_ns", lambda: self.now_ns)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now_ns / 1e9)
        graph_opened, module_opened = Graphs._open, Modules._open
        device = self

        class Timed:
            def __init__(self, runner: Runner, weights: int) -> None:
                device.opened += 1
                self.runner, self.weights = runner, weights

            def __enter__(self):
                self.runner.__enter__()
                return self

            def __exit__(self, *error) -> None:
                self.runner.__exit__(*error)

            def bind(self, images: np.ndarray) -> Callable[[], object]:
                real = self.runner.bind(images)

                def run() -> None:
                    device.now_ns += round(device.speed * (1e6 + NS_A_MAC * self.weights * len(images)))
                    real()

                return run

        monkeypatch.setattr(
            Graphs, "_open", lambda self, path, *rest: Timed(graph_opened(self, path, *rest), weights_of_graph(path))
        )
        monkeypatch.setattr(
            Modules,
            "_open",
            lambda self, module, *rest: Timed(module_opened(self, module, *rest), weights_of_module(module)),
        )


def weights_of_graph(path: Path) -> int:
    graph = onnx.load(path).graph
    products = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    return sum(int(np.prod(tensor.dims)) for tensor in graph.initializer if tensor.name in products)


def weights_of_module(module: nn.Module) -> int:
    """Of the linear layers that run for every token; a classifier's runs once."""
    layers = [layer for name, layer in module.named_modules() if name != "head"]
    plain = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    pivoted = [w for layer in layers if isinstance(layer, PivotedLinear) for w in (layer.pivot, layer.below)]
    return sum(weight.numel() for weight in (*plain, *pivoted))
