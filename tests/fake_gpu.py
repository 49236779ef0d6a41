"""The absent GPU: CUDA's runtime with the host's memory for a device, and TensorRT whose engines are a test's."""

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from types import ModuleType, SimpleNamespace

import numpy as np

Compute = Callable[[np.ndarray], np.ndarray]


class FakeGpu:
    """CUDA's runtime: what it hands out is counted, and a copy reaches only what is allocated."""

    def __init__(self) -> None:
        self.memory: dict[int, ctypes.Array] = {}
        self.copies = 0
        self.fails_at = ""
        runtime = ModuleType("cuda.bindings.runtime")
        self.name, self.capability, self.cuda, self.is_there = "NVIDIA A10", (8, 6), 13000, True
        runtime.cudaError_t = SimpleNamespace(cudaSuccess=0)
        runtime.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
        runtime.cudaGetDeviceProperties = lambda device: self.properties()
        runtime.cudaDriverGetVersion = lambda: (0, self.cuda)
        for name in ("Malloc", "Free", "MemcpyAsync", "StreamCreate", "StreamDestroy", "StreamSynchronize"):
            setattr(runtime, f"cuda{name}", lambda *args, name=name: self.call(name, *args))
        self.runtime = runtime

    def properties(self) -> tuple:
        major, minor = self.capability
        return (0, SimpleNamespace(name=self.name.encode(), major=major, minor=minor)) if self.is_there else (35, None)

    def call(self, name: str, *args):
        if name == self.fails_at:
            return (2, None)
        values = getattr(self, name)(*args)
        return (0,) if values is None else (0, values)

    def Malloc(self, size: int) -> int:
        block = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def Free(self, address: int) -> None:
        del self.memory[address]

    def MemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        assert len(self.memory[target if kind == 1 else source]) == size
        self.copies += 1
        ctypes.memmove(target, source, size)

    def StreamCreate(self) -> int:
        return 77

    def StreamDestroy(self, stream: int) -> None:
        assert stream == 77

    def StreamSynchronize(self, stream: int) -> None:
        assert stream == 77


class FakeEngine:
    """Runs `compute` on float32 images [B, ...] of its profiles, which are shapes: smallest, usual, largest."""

    num_io_tensors = 2

    def __init__(self, compute: Compute, classes: int, profiles: Sequence[Sequence[tuple[int, ...]]]) -> None:
        self.compute, self.classes, self.profiles = compute, classes, profiles
        self.runs = True
        self.ran_with: list[tuple[int, int]] = []

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return ("images", "logits")[index]

    def get_tensor_mode(self, name: str) -> str:
        return {"images": "in", "logits": "out"}[name]

    def get_tensor_dtype(self, name: str) -> str:
        return "float"

    def get_tensor_profile_shape(self, name: str, profile: int) -> Sequence[tuple[int, ...]]:
        return self.profiles[profile]

    def create_execution_context(self) -> "FakeEngine":
        self.addresses: dict[str, int] = {}
        self.profile = 0
        return self

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile, self.shape = profile, None
        return True

    def set_input_shape(self, name: str, shape: tuple) -> None:
        smallest, _, largest = self.profiles[self.profile]
        assert smallest[0] <= shape[0] <= largest[0], "outside the profile"
        self.shape = shape

    def get_tensor_shape(self, name: str) -> tuple:
        return (self.shape[0], self.classes)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def create_engine_inspector(self) -> "FakeInspector":
        return FakeInspector()

    def execute_async_v3(self, stream: int) -> bool:
        if self.runs:
            self.ran_with.append((self.profile, self.shape[0]))
            images = seen(self.addresses["images"], self.shape)
            seen(self.addresses["logits"], (self.shape[0], self.classes))[:] = self.compute(images.copy())
        return self.runs


class FakeInspector:
    """Knows an engine of one product in FP16, once it has been told in which context."""

    execution_context = None

    def get_engine_information(self, form: str) -> str:
        assert (form, self.execution_context is not None) == ("json", True)
        return (
            '{"Layers": [{"Name": "head", "LayerType": "gemm", "Outputs": [], "Inputs": '
            '[{"Name": "images", "Format/Datatype": "Row major linear FP16 format"}]}]}'
        )


def seen(address: int, shape: tuple) -> np.ndarray:
    """What lies in the device's memory."""
    return np.ctypeslib.as_array((ctypes.c_float * math.prod(shape)).from_address(address)).reshape(shape)


def fake_tensorrt(opened: Callable[[bytes], FakeEngine | None], version: str = "11.4") -> ModuleType:
    """TensorRT that opens engines as `opened` does, and builds none."""
    trt = ModuleType("tensorrt")
    trt.__version__ = version
    trt.ILogger = type("ILogger", (), {"Severity": IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING")})
    trt.LayerInformationFormat = SimpleNamespace(JSON="json")
    trt.TensorIOMode = SimpleNamespace(INPUT="in")
    trt.nptype = lambda dtype: {"float": np.float32}[dtype]
    trt.Runtime = lambda logger: SimpleNamespace(
        engine_host_code_allowed=False, deserialize_cuda_engine=lambda plan: opened(plan)
    )
    return trt


def install(monkeypatch, gpu: FakeGpu, trt: ModuleType) -> None:
    """Let both be found where NVIDIA's would."""
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", ModuleType("cuda.bindings"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", gpu.runtime)
