"""The memory that serving one artefact takes, seen in a process that does nothing else.

In a process that runs several artefacts, allocators keep and share what they once had, so that no figure of one can be
told. What Linux says of a process is read; elsewhere nothing is measured.
"""

import importlib
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from export.runners import Runner
from export.tensorrt_runner import cuda_runtime
from flora.errors import FloraError

MIB = 2**20
RUNS = 3
STATUS = Path("/proc/self/status")


class PeakMemory(BaseModel):
    """Mebibytes of a process that opened (and compiled) an artefact and ran batches up to this one, each a few times.

    `peak_mib` is the most that was ever resident, `growth_mib` what of it came after the runtime's libraries. `gpu_mib`
    is by how much the free memory of the GPU has sunk, by whatever process.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    peak_mib: float
    growth_mib: float
    gpu_mib: float | None = None


def can_measure() -> bool:
    """Whether this system says how much memory a process has had."""
    return STATUS.is_file()


def peak_memory(
    opens: Callable[[], AbstractContextManager[Runner]],
    library: str,
    images: Sequence[np.ndarray],
    *,
    what: str,
    on_gpu: bool = False,
) -> list[PeakMemory]:
    """Memory after each batch of `images`, smallest first, in a new process that imports `library` before it `opens`.

    `FloraError` naming `what` where that process is ended from outside, as Linux does when memory runs out.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measured, opens, library, list(images), on_gpu).result()
        except BrokenProcessPool as error:
            raise FloraError(
                f"The process that measured the memory of {what} was ended from outside; most likely memory ran out. "
                "Take a smaller --batch, or leave memory out with --no-memory. (A script that calls flora needs "
                'if __name__ == "__main__": for that process.)'
            ) from error


def _measured(
    opens: Callable[[], AbstractContextManager[Runner]], library: str, images: list[np.ndarray], on_gpu: bool
) -> list[PeakMemory]:
    importlib.import_module(library)
    before, free = _resident_mib("VmRSS"), _free_gpu_mib() if on_gpu else 0.0
    found = []
    with opens() as runner:
        for batch in images:
            for _ in range(RUNS):
                runner(batch)
            peak = _resident_mib("VmHWM")
            gpu = free - _free_gpu_mib() if on_gpu else None
            found.append(PeakMemory(peak_mib=peak, growth_mib=peak - before, gpu_mib=gpu))
    return found


def _resident_mib(field: str) -> float:
    """A figure of /proc/self/status: VmRSS is what is resident, VmHWM the most that was since the process began."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
    return int(lines[field].split()[0]) / 1024


def _free_gpu_mib() -> float:
    cuda = cuda_runtime()
    error, free, _ = cuda.cudaMemGetInfo()
    if error != cuda.cudaError_t.cudaSuccess:
        raise FloraError(f"cudaMemGetInfo failed with {error}. Is the GPU there?")
    return free / MIB
