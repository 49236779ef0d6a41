"""The TensorRT runner against a fake of the absent GPU: a device that is memory of the host, an engine that sums."""

import ctypes
import json
import math
import sys
from enum import IntEnum
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from export.attestation import attest_engine
from export.tensorrt_runner import TensorRtRunner
from flora.errors import BackendMissingError, FloraError, InputError

CLASSES = 3
SMALLEST, LARGEST = (1, 1, 4, 4), (8, 1, 4, 4)


class FakeGpu:
    """CUDA's runtime: what it hands out is counted, and a copy reaches only what is allocated."""

    def __init__(self) -> None:
        self.memory: dict[int, ctypes.Array] = {}
        self.copies = 0
        self.fails_at = ""
        runtime = ModuleType("cuda.bindings.runtime")
        runtime.cudaError_t = SimpleNamespace(cudaSuccess=0)
        runtime.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
        for name in ("Malloc", "Free", "MemcpyAsync", "StreamCreate", "StreamDestroy", "StreamSynchronize"):
            setattr(runtime, f"cuda{name}", lambda *args, name=name: self.call(name, *args))
        self.runtime = runtime

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
    """Logits are the sum of an image times the class number."""

    num_io_tensors = 2
    runs = True

    def get_tensor_name(self, index: int) -> str:
        return ("images", "logits")[index]

    def get_tensor_mode(self, name: str) -> str:
        return {"images": "in", "logits": "out"}[name]

    def get_tensor_dtype(self, name: str) -> str:
        return "float"

    def get_tensor_profile_shape(self, name: str, profile: int) -> tuple:
        return SMALLEST, SMALLEST, LARGEST

    def create_execution_context(self) -> "FakeEngine":
        self.addresses: dict[str, int] = {}
        return self

    def set_input_shape(self, name: str, shape: tuple) -> None:
        self.shape = shape

    def get_tensor_shape(self, name: str) -> tuple:
        return (self.shape[0], CLASSES)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def create_engine_inspector(self) -> "FakeInspector":
        return FakeInspector()

    def execute_async_v3(self, stream: int) -> bool:
        if self.runs:
            images = seen(self.addresses["images"], self.shape)
            seen(self.addresses["logits"], (self.shape[0], CLASSES))[:] = expected(images)
        return self.runs


class FakeInspector:
    """Knows an engine of one product in FP16, once it has been told in which context."""

    execution_context = None

    def get_engine_information(self, form: str) -> str:
        assert (form, self.execution_context is not None) == ("json", True)
        inputs = [{"Name": "images", "Format/Datatype": "Row major linear FP16 format"}]
        return json.dumps({"Layers": [{"Name": "head", "LayerType": "gemm", "Inputs": inputs, "Outputs": []}]})


def seen(address: int, shape: tuple) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_float * math.prod(shape)).from_address(address)).reshape(shape)


def expected(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).sum(1)[:, None] * np.arange(CLASSES, dtype=np.float32)


@pytest.fixture
def gpu(monkeypatch) -> FakeGpu:
    gpu = FakeGpu()
    trt = ModuleType("tensorrt")
    trt.__version__ = "11.4"
    trt.ILogger = type("ILogger", (), {"Severity": IntEnum("Severity", "INTERNAL_ERROR ERROR")})
    trt.LayerInformationFormat = SimpleNamespace(JSON="json")
    trt.TensorIOMode = SimpleNamespace(INPUT="in")
    trt.nptype = lambda dtype: {"float": np.float32}[dtype]
    trt.Runtime = lambda logger: SimpleNamespace(
        deserialize_cuda_engine=lambda plan: FakeEngine() if plan == b"engine" else None
    )
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", ModuleType("cuda.bindings"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", gpu.runtime)
    return gpu


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / "model.engine"
    path.write_bytes(b"engine")
    return path


def images(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).random((batch, 1, 4, 4)).astype(np.float32)


def test_images_go_to_the_gpu_and_logits_come_back_at_any_batch_and_nothing_is_left(gpu, engine):
    with TensorRtRunner(engine) as runner:
        assert (runner.name, runner.provider) == ("model.engine", "TensorRT 11.4")
        for batch in (2, 2, 8, 1):
            np.testing.assert_allclose(runner(images(batch)), expected(images(batch)), rtol=1e-6)
            assert len(gpu.memory) == 2
        np.testing.assert_allclose(runner(images(4)[::2]), expected(images(4)[::2]), rtol=1e-6)
    assert not gpu.memory
    with pytest.raises(InputError, match="closed"):
        runner(images(1))


def test_an_engine_tells_what_its_products_are_computed_in(gpu, engine):
    found = attest_engine(engine)
    assert (found.source, found.shares) == ("engine inspector of TensorRT", {"fp16": 1.0})


def test_what_is_timed_copies_nothing(gpu, engine):
    with TensorRtRunner(engine) as runner:
        call = runner.bind(images(2))
        before = gpu.copies
        call()
        assert gpu.copies == before
        np.testing.assert_allclose(seen(runner._buffers["logits"], (2, CLASSES)), expected(images(2)), rtol=1e-6)


@pytest.mark.parametrize("wrong", [images(9), images(2)[:, :, :2], images(2).astype(np.float64), images(2)[0]])
def test_images_outside_the_profile_are_refused_before_anything_is_copied(gpu, engine, wrong):
    with TensorRtRunner(engine) as runner:
        with pytest.raises(InputError, match=r"takes float32 images of shapes \[1, 1, 4, 4\] to \[8, 1, 4, 4\], got"):
            runner(wrong)
        assert gpu.copies == 0


def test_an_engine_of_another_version_is_said(gpu, engine):
    engine.write_bytes(b"from elsewhere")
    with pytest.raises(FloraError, match=r"does not load in TensorRT 11\.4.*build it again from the ONNX file"):
        TensorRtRunner(engine)
    with pytest.raises(InputError, match="does not exist"):
        TensorRtRunner(engine.with_name("no.engine"))


@pytest.mark.parametrize("function", ["Malloc", "MemcpyAsync", "StreamSynchronize"])
def test_a_failure_of_cuda_is_named(gpu, engine, function):
    with TensorRtRunner(engine) as runner:
        gpu.fails_at = function
        with pytest.raises(FloraError, match=f"cuda{function} failed for .* with 2"):
            runner(images(2))


def test_a_run_that_fails_is_no_answer(gpu, engine, monkeypatch):
    with TensorRtRunner(engine) as runner:
        monkeypatch.setattr(FakeEngine, "runs", False)
        with pytest.raises(FloraError, match="failed to run"):
            runner(images(2))


def test_without_the_bindings_it_says_what_to_install(gpu, engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(BackendMissingError, match=r"cuda-bindings.*flora-vit\[gpu\]"):
        TensorRtRunner(engine)
