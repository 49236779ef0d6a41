"""The GPU that engines are built and run on, as CUDA names it; no torch is needed."""

import importlib
from types import ModuleType

from pydantic import BaseModel, ConfigDict

from flora.errors import BackendMissingError
from flora.provenance import gpu_facts


class Gpu(BaseModel):
    """A GPU and its driver. `cuda` is the newest CUDA that the driver runs; the driver is unknown without its tool."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    compute_capability: str
    cuda: str
    driver: str | None = None


def cuda_runtime() -> ModuleType:
    """CUDA's own bindings; `BackendMissingError` where there are none."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise BackendMissingError(
            f"cuda-bindings is not installed or does not load ({error}). Run: pip install 'flora-vit[gpu]'"
        ) from error


def present_gpu() -> Gpu | None:
    """The first GPU that this process sees; None where there is none."""
    cuda = cuda_runtime()
    error, properties = cuda.cudaGetDeviceProperties(0)
    if error != cuda.cudaError_t.cudaSuccess:
        return None
    _, version = cuda.cudaDriverGetVersion()
    return Gpu(
        name=properties.name.decode().rstrip("\0"),
        compute_capability=f"sm{properties.major}{properties.minor}",
        cuda=f"{version // 1000}.{version % 1000 // 10}",
        driver=gpu_facts().get("driver"),
    )


def required_gpu(what: str) -> Gpu:
    """The first GPU that this process sees; `BackendMissingError` where there is none for `what` needs one."""
    gpu = present_gpu()
    if gpu is None:
        raise BackendMissingError(f"{what} needs the NVIDIA GPU that it is for, and CUDA finds none here.")
    return gpu
