"""The runtimes that an ONNX file can be run and measured on: what each computes in, and the packages it comes from."""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from export.runners import CPU, CUDA, TENSORRT_PROVIDER, OnnxRunner, OpenVinoRunner, Runner
from flora.errors import BackendMissingError, InputError, near_matches


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """`label` is for tables; `precisions` are those that a model's layers can be timed in, none where they cannot be.

    What `loads_onnx` can verify and measure the ONNX files of a bundle; `files` are the precisions of those that it
    runs, `worthwhile` those that can be faster than FP32 there, `only_shown` those that it has no kernels for and
    rounds as they say, to see what an engine will compute.
    """

    label: str
    packages: tuple[str, ...]
    precisions: tuple[str, ...] = ("fp32",)
    files: tuple[str, ...] = ()
    worthwhile: tuple[str, ...] = ()
    only_shown: tuple[str, ...] = ()
    on_gpu: bool = False

    @property
    def loads_onnx(self) -> bool:
        return bool(self.files)


ORT_CPU, TENSORRT, TORCH, TORCH_CUDA = "ort-cpu", "tensorrt", "torch", "torch-cuda"
TORCH_COMPILED, TORCH_CUDA_COMPILED = "torch-compiled", "torch-cuda-compiled"
TORCH_RUNTIMES = (TORCH, TORCH_COMPILED, TORCH_CUDA, TORCH_CUDA_COMPILED)
RUNTIMES = {
    ORT_CPU: Runtime(
        label="ONNX Runtime",
        packages=("onnxruntime", "onnxruntime-gpu"),
        precisions=("fp32", "int8"),
        files=("fp32", "fp16", "int8", "int8-fp16", "fp8"),
        worthwhile=("int8",),
        only_shown=("int8-fp16", "fp8"),
    ),
    "openvino": Runtime(
        label="OpenVINO",
        packages=("openvino",),
        precisions=("fp32", "bf16", "int8"),
        files=("fp32", "fp16", "bf16", "int8"),
        worthwhile=("int8",),
    ),
    "ort-cuda": Runtime(
        label="ONNX Runtime on CUDA",
        packages=("onnxruntime-gpu",),
        precisions=("fp32", "int8"),
        files=("fp32", "fp16", "bf16", "int8"),
        worthwhile=("fp16", "int8"),
        on_gpu=True,
    ),
    # Hands the graph to TensorRT, which rounds products in FP32 to 10 bits, and what that does not take to CUDA.
    "ort-tensorrt": Runtime(
        label="ONNX Runtime on TensorRT", packages=("onnxruntime-gpu",), files=("fp32",), on_gpu=True
    ),
    TENSORRT: Runtime(label="TensorRT", packages=("tensorrt",), precisions=("fp32", "int8"), on_gpu=True),
    TORCH: Runtime(label="torch", packages=("torch",), precisions=("fp32", "bf16")),
    TORCH_COMPILED: Runtime(label="torch compiled", packages=("torch",), precisions=()),
    TORCH_CUDA: Runtime(label="torch on CUDA", packages=("torch",), precisions=("fp32", "fp16", "bf16"), on_gpu=True),
    TORCH_CUDA_COMPILED: Runtime(label="torch compiled on CUDA", packages=("torch",), precisions=(), on_gpu=True),
}


# The first is the one that must load.
PROVIDERS = {ORT_CPU: (CPU,), "ort-cuda": (CUDA,), "ort-tensorrt": (TENSORRT_PROVIDER, CUDA)}


def precision_of_products(precision: str) -> str:
    """What products are computed in, in a file of this precision: int8-fp16 has FP16 around them."""
    return precision.partition("-")[0]


def runtime_called(name: str) -> Runtime:
    """The runtime of that name; `InputError` where there is none."""
    if name not in RUNTIMES:
        raise InputError(f"{name!r} is no runtime; give one of {', '.join(RUNTIMES)}.{near_matches(name, RUNTIMES)}")
    return RUNTIMES[name]


def runtime_version(name: str) -> tuple[str, str]:
    """The package that the runtime comes from here, and its version; `BackendMissingError` where none is installed."""
    packages = runtime_called(name).packages
    for package in packages:
        try:
            return package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise BackendMissingError(f"{name} needs {' or '.join(packages)}, which is not installed; see flora doctor.")


def check_loads_onnx(name: str) -> None:
    """Raise `InputError` for a runtime that runs no ONNX files."""
    if not runtime_called(name).loads_onnx:
        allowed = ", ".join(key for key, one in RUNTIMES.items() if one.loads_onnx)
        raise InputError(f"{name} runs no ONNX files; give one of {allowed}.")


def open_runner(
    runtime: str,
    path: Path,
    *,
    threads: int | None = None,
    precision: str = "fp32",
    name: str | None = None,
    as_written: bool = False,
) -> Runner:
    """A runner of the ONNX file `path`; `InputError` where the runtime runs none.

    ONNX Runtime can compute a file as it is written, node by node; OpenVINO cannot.
    """
    check_loads_onnx(runtime)
    if runtime == "openvino":
        return OpenVinoRunner(path, threads=threads, precision=precision, name=name)
    return OnnxRunner(path, threads=threads, providers=PROVIDERS[runtime], name=name, as_written=as_written)
