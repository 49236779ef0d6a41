"""A device for tests of latency: a real runtime on a clock on which products take time by their size."""

import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from flora.pipeline.latency import LatencyRequest

NS_A_MAC = 40


class ClockedDevice:
    """A device on which a graph takes 1 ms and so many nanoseconds for each weight of its products and each image."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns, self.opened, self.speed = 0, 0, 1.0
        monkeypatch.setattr(time, "perf_counter_ns", lambda: self.now_ns)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now_ns / 1e9)
        real = LatencyRequest.open
        device = self

        class Timed:
            def __init__(self, request: LatencyRequest, path: Path, precision: str) -> None:
                device.opened += 1
                self.runner = real(request, path, precision)
                graph = onnx.load(path).graph
                products = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
                self.weights = sum(int(np.prod(t.dims)) for t in graph.initializer if t.name in products)

            def __enter__(self):
                return self

            def __exit__(self, *error) -> None:
                self.runner.__exit__(*error)

            def __call__(self, images: np.ndarray) -> np.ndarray:
                device.now_ns += round(device.speed * (1e6 + NS_A_MAC * self.weights * len(images)))
                return self.runner(images)

        monkeypatch.setattr(LatencyRequest, "open", lambda request, path, precision: Timed(request, path, precision))
