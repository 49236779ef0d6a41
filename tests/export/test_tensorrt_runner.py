"""The TensorRT runner against a fake of the absent GPU: a device that is memory of the host, an engine that sums."""

import sys

import numpy as np
import pytest

from export.attestation import attest_engine
from export.tensorrt_runner import TensorRtRunner
from flora.errors import BackendMissingError, FloraError, InputError
from tests.fake_gpu import FakeEngine, FakeGpu, fake_tensorrt, install, seen

CLASSES = 3
SIZE = (1, 4, 4)


def expected(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).sum(1)[:, None] * np.arange(CLASSES, dtype=np.float32)


def shapes(*batches: int) -> list[tuple[int, ...]]:
    return [(batch, *SIZE) for batch in batches]


@pytest.fixture
def opened() -> FakeEngine:
    """What any engine file is here."""
    return FakeEngine(expected, CLASSES, [shapes(1, 4, 8)])


@pytest.fixture
def gpu(monkeypatch, opened) -> FakeGpu:
    gpu = FakeGpu()
    install(monkeypatch, gpu, fake_tensorrt(lambda plan: opened if plan == b"engine" else None))
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


@pytest.mark.parametrize("wrong", [images(2)[:, :, :2], images(2).astype(np.float64), images(2)[0]])
def test_images_of_another_kind_are_refused_before_anything_is_copied(gpu, engine, wrong):
    with TensorRtRunner(engine) as runner:
        with pytest.raises(InputError, match=r"takes float32 images of shapes \[1, 1, 4, 4\] to \[8, 1, 4, 4\], got"):
            runner(wrong)
        assert gpu.copies == 0


def test_a_batch_in_no_profile_is_refused_and_the_profiles_are_named(gpu, engine, opened):
    opened.profiles = [shapes(1, 4, 8), shapes(16, 16, 16)]
    with TensorRtRunner(engine) as runner:
        with pytest.raises(InputError, match=r"profiles 1/4/8 and 16/16/16 \(min/opt/max\), got 9 images"):
            runner(images(9))
        assert gpu.copies == 0


def test_a_batch_runs_in_the_profile_that_is_optimized_nearest_to_it(gpu, engine, opened):
    opened.profiles = [shapes(1, 8, 32), shapes(1, 1, 1), shapes(2, 4, 4)]
    with TensorRtRunner(engine) as runner:
        assert runner.profiles == ((1, 8, 32), (1, 1, 1), (2, 4, 4))
        for batch in (1, 32, 2, 4, 6, 1, 8):
            np.testing.assert_allclose(runner(images(batch)), expected(images(batch)), rtol=1e-6)
    assert opened.ran_with == [(1, 1), (0, 32), (2, 2), (2, 4), (0, 6), (1, 1), (0, 8)]


def test_an_engine_of_another_version_is_said(gpu, engine):
    engine.write_bytes(b"from elsewhere")
    with pytest.raises(FloraError, match=r"does not load in tensorrt 11\.4.*build it again from the ONNX file"):
        TensorRtRunner(engine)
    with pytest.raises(InputError, match="does not exist"):
        TensorRtRunner(engine.with_name("no.engine"))


@pytest.mark.parametrize("function", ["Malloc", "MemcpyAsync", "StreamSynchronize"])
def test_a_failure_of_cuda_is_named(gpu, engine, function):
    with TensorRtRunner(engine) as runner:
        gpu.fails_at = function
        with pytest.raises(FloraError, match=f"cuda{function} failed for .* with 2"):
            runner(images(2))


def test_a_run_that_fails_is_no_answer(gpu, engine, opened):
    with TensorRtRunner(engine) as runner:
        opened.runs = False
        with pytest.raises(FloraError, match="failed to run"):
            runner(images(2))


def test_without_the_bindings_it_says_what_to_install(gpu, engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(BackendMissingError, match=r"cuda-bindings.*flora-vit\[gpu\]"):
        TensorRtRunner(engine)
