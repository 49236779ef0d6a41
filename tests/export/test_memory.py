"""Memory is that of a process of its own, and grows by what is really taken."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from export.memory import can_measure, peak_memory
from export.runners import OnnxRunner
from flora.errors import FloraError, InputError

pytestmark = pytest.mark.skipif(not can_measure(), reason="this system does not tell the memory of a process")
MIB = 2**20


def images_of(batch: int) -> np.ndarray:
    return np.zeros((batch, 1, 28, 28), np.float32)


@contextmanager
def holding(mib: int) -> Iterator:
    """A runner that takes so much when it is opened, and as much again for each image while it runs."""
    kept = np.ones(mib * MIB, np.uint8)

    def run(images: np.ndarray) -> int:
        return int(np.ones(mib * MIB * len(images), np.uint8)[-1] + kept[-1])

    yield run


@contextmanager
def opened(path: Path) -> Iterator[OnnxRunner]:
    with OnnxRunner(path, threads=1) as runner:
        yield runner


@contextmanager
def killed() -> Iterator:
    os.kill(os.getpid(), signal.SIGKILL)
    yield None


def test_growth_is_what_was_held_at_most_up_to_each_batch():
    one, three = peak_memory(partial(holding, 64), "numpy", [images_of(1), images_of(3)], what="64 MiB")
    assert one.growth_mib == pytest.approx(2 * 64, abs=12)
    assert three.growth_mib == pytest.approx(4 * 64, abs=12)
    assert one.peak_mib - one.growth_mib == three.peak_mib - three.growth_mib > 5
    assert one.gpu_mib is None


def test_a_file_is_run_in_a_process_of_its_own(onnx_file):
    before = os.getpid()
    found = peak_memory(partial(opened, onnx_file), "onnxruntime", [images_of(1), images_of(16)], what="model")
    assert os.getpid() == before
    assert [one.growth_mib > 0 for one in found] == [True, True]
    assert found[0].peak_mib <= found[1].peak_mib < 1000


def test_an_error_in_that_process_is_raised_here(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        peak_memory(partial(opened, tmp_path / "none.onnx"), "onnxruntime", [images_of(1)], what="model")


def test_a_process_that_was_killed_says_what_to_do():
    with pytest.raises(FloraError, match=r"memory of the large one was ended from outside; .* smaller --batch"):
        peak_memory(killed, "numpy", [images_of(1)], what="the large one")
