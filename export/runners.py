"""What runs a model for verification, behind one protocol: images in, logits out.

A runner owns a session and gives it back when its block ends. Its `provider` is the one that really runs: ONNX Runtime
lists providers that it cannot load, and falls back to the CPU with no more than a line in its log.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from flora.errors import BackendMissingError, InputError

CPU = "CPUExecutionProvider"
NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
FATAL_ONLY = 4
CUDA = "CUDAExecutionProvider"
TENSORRT_PROVIDER = "TensorrtExecutionProvider"
PROVIDER_OPTIONS = {
    # FP32 is what is said, so it is what is computed: without this, products on a GPU are rounded to 10 bits.
    CUDA: {"use_tf32": "0"},
    # Nothing is read that another version or GPU has left.
    TENSORRT_PROVIDER: {"trt_fp16_enable": "0", "trt_engine_cache_enable": "0"},
}


class Runner(Protocol):
    """A context manager that computes logits [B, classes] of images [B, C, H, W]."""

    name: str
    provider: str

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __call__(self, images: np.ndarray) -> np.ndarray: ...

    def bind(self, images: np.ndarray) -> Callable[[], object]:
        """A call that runs `images` and waits; on a GPU they lie there already, and what comes out stays."""
        ...


class OnnxRunner:
    """Runs an ONNX file on ONNX Runtime; the first of `providers` must really load.

    `as_written`, each node is run by itself, so that quantized products are those of the file and not of a kernel here:
    what another device computes, not how fast. FP16 is computed in FP32 all the same.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        providers: Sequence[str] = (CPU,),
        name: str | None = None,
        as_written: bool = False,
    ) -> None:
        self.path = Path(path)
        self.name = name or self.path.name
        self._session = _session(self.path, session_options(threads, as_written=as_written), list(providers))
        loaded = self._session.get_providers()
        if providers[0] not in loaded:
            raise BackendMissingError(
                f"ONNX Runtime was asked for {providers[0]} and loaded {', '.join(loaded)}. Install the package and "
                "the driver that provide it (pip install 'flora-vit[gpu]' for NVIDIA GPUs), or ask for the CPU."
            )
        self.provider = providers[0]
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type not in NUMPY_TYPES:
            found = ", ".join(f"{value.name}: {value.type}" for value in inputs)
            raise InputError(f"{self.path} takes {found}; one floating-point image input is expected.")
        self._input = inputs[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        if self._session is None:
            raise InputError(f"The runner of {self.path} is closed; open a new one.")
        _check_images(images, self._input, self.path)
        return self._session.run(None, {self._input.name: images})[0]

    def bind(self, images: np.ndarray) -> Callable[[], object]:
        """A call that runs `images` and waits; on a GPU they lie there already, and what comes out stays."""
        if self.provider == CPU:
            return partial(self, images)
        _check_images(images, self._input, self.path)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._input.name, _onnxruntime().OrtValue.ortvalue_from_numpy(images, "cuda", 0))
        binding.bind_output(self._session.get_outputs()[0].name, "cuda")

        def run() -> None:
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run


def _session(path: Path, options, providers: list[str]):
    onnxruntime = _onnxruntime()
    if not path.is_file():
        raise InputError(f"{path} does not exist; give an ONNX file.")
    if unknown := [name for name in providers if name not in onnxruntime.get_available_providers()]:
        raise BackendMissingError(
            f"ONNX Runtime has no {', '.join(unknown)} here, only "
            f"{', '.join(onnxruntime.get_available_providers())}. Install the package that provides it."
        )
    failures = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        return onnxruntime.InferenceSession(
            path,
            options,
            providers=[(name, PROVIDER_OPTIONS[name]) if name in PROVIDER_OPTIONS else name for name in providers],
        )
    except (
        failures.Fail,
        failures.InvalidArgument,
        failures.InvalidGraph,
        failures.InvalidProtobuf,
        failures.NoModel,
        failures.NotImplemented,
        failures.RuntimeException,
    ) as error:
        raise InputError(f"{path} is no ONNX file that can run here ({error}); export or copy it again.") from error


def session_options(threads: int | None, *, as_written: bool = False):
    """Options of ONNX Runtime for so many threads, as many as it likes for None; `as_written` it changes no graph."""
    options = _onnxruntime().SessionOptions()
    options.log_severity_level = FATAL_ONLY
    if as_written:
        options.graph_optimization_level = _onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    return options


def openvino_config(precision: str, threads: int | None) -> dict[str, str]:
    """How OpenVINO is to compile a model for the CPU."""
    config = {"INFERENCE_PRECISION_HINT": OPENVINO_PRECISIONS[precision], "PERFORMANCE_HINT": "LATENCY"}
    return config if threads is None else config | {"INFERENCE_NUM_THREADS": str(threads)}


def _onnxruntime():
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendMissingError(
            f"onnxruntime is not installed or does not load ({error}). Run: pip install 'flora-vit[cpu]'"
        ) from error
    return onnxruntime


def _check_images(images: np.ndarray, declared, path: Path) -> None:
    """Hold the array against the graph's input before the runtime sees it."""
    expected = NUMPY_TYPES[declared.type]
    shape = [size if isinstance(size, int) else None for size in declared.shape]
    fits = len(shape) == images.ndim and all(
        size in (None, given) for size, given in zip(shape, images.shape, strict=True)
    )
    if not fits or images.dtype != expected or len(images) == 0:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(
            f"{path} takes {np.dtype(expected).name} images of shape [{wanted}], got {images.dtype} "
            f"{list(images.shape)}; preprocess the images with the settings of this model."
        )


class OpenVinoRunner:
    """Runs an ONNX file on OpenVINO, on the CPU; `precision` is the one to compute in, which is BF16 unless said."""

    def __init__(
        self, path: Path, *, threads: int | None = None, precision: str = "fp32", name: str | None = None
    ) -> None:
        try:
            import openvino
        except ImportError as error:
            raise BackendMissingError(
                f"openvino is not installed or does not load ({error}). Run: pip install 'flora-vit[openvino]'"
            ) from error
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{path} does not exist; give an ONNX file.")
        self.name = name or self.path.name
        try:
            self._compiled = openvino.Core().compile_model(str(self.path), "CPU", openvino_config(precision, threads))
        except RuntimeError as error:
            raise InputError(f"{path} is no ONNX file that OpenVINO can run here ({error}).") from error
        self._request = self._compiled.create_infer_request()
        used = self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if used != OPENVINO_PRECISIONS[precision]:
            raise BackendMissingError(
                f"OpenVINO was asked for {precision} and computes in {used}: this processor has no instructions for "
                f"{precision}. Ask for fp32."
            )
        self.provider = f"OpenVINO CPU, {used}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._request = self._compiled = None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        if self._request is None:
            raise InputError(f"The runner of {self.path} is closed; open a new one.")
        return self._request.infer([images], share_inputs=True)[0]

    def bind(self, images: np.ndarray) -> Callable[[], object]:
        """A call that runs `images`."""
        return partial(self, images)


OPENVINO_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
