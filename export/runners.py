"""What runs a model for verification, behind one protocol: images in, logits out.

A runner owns a session and gives it back when its block ends. Its `provider` is the one that really runs: ONNX Runtime
lists providers that it cannot load, and falls back to the CPU with no more than a line in its log.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from export.inputs import ImageInput
from flora.errors import BackendMissingError, FloraError, InputError
from flora.onnxsessions import onnxruntime_failures, onnxruntime_module, session_options

CPU = "CPUExecutionProvider"
NUMPY_TYPES: dict[str, type[np.floating]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
}
CUDA = "CUDAExecutionProvider"
TENSORRT_PROVIDER = "TensorrtExecutionProvider"
PROVIDER_OPTIONS = {
    # FP32 is what is said, so it is what is computed: without this, products on a GPU are rounded to 10 bits.
    CUDA: {"use_tf32": "0"},
    # Nothing is read that another version or GPU has left.
    TENSORRT_PROVIDER: {"trt_fp16_enable": "0", "trt_engine_cache_enable": "0"},
}


class Runner(Protocol):
    """A context manager that computes logits [B, classes] of images [B, C, H, W].

    `described` is what an ONNX file says of itself, by key.
    """

    name: str
    provider: str
    described: Mapping[str, str]

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
        self.described: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type not in NUMPY_TYPES:
            found = ", ".join(f"{value.name}: {value.type}" for value in inputs)
            raise InputError(f"{self.path} takes {found}; one floating-point image input is expected.")
        self._input = inputs[0].name
        shape = tuple(size if isinstance(size, int) else None for size in inputs[0].shape)
        self._takes = ImageInput(dtype=NUMPY_TYPES[inputs[0].type], shape=shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        if self._session is None:
            raise InputError(f"The runner of {self.path} is closed; open a new one.")
        self._takes.check(images, str(self.path))
        try:
            return self._session.run(None, {self._input: images})[0]
        except onnxruntime_failures() as error:
            raise FloraError(
                f"{self.path} does not run on {len(images)} images ({error}). If memory ran out, take a smaller batch."
            ) from error

    def bind(self, images: np.ndarray) -> Callable[[], object]:
        """A call that runs `images` and waits; on a GPU they lie there already, and what comes out stays."""
        if self.provider == CPU:
            return partial(self, images)
        self._takes.check(images, str(self.path))
        binding = self._session.io_binding()
        on_gpu = onnxruntime_module().OrtValue.ortvalue_from_numpy(images, "cuda", 0)
        binding.bind_ortvalue_input(self._input, on_gpu)
        binding.bind_output(self._session.get_outputs()[0].name, "cuda")

        def run() -> None:
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run


def _session(path: Path, options, providers: list[str]):
    onnxruntime = onnxruntime_module()
    if not path.is_file():
        raise InputError(f"{path} does not exist; give an ONNX file.")
    if unknown := [name for name in providers if name not in onnxruntime.get_available_providers()]:
        raise BackendMissingError(
            f"ONNX Runtime has no {', '.join(unknown)} here, only "
            f"{', '.join(onnxruntime.get_available_providers())}. Install the package that provides it."
        )
    try:
        return onnxruntime.InferenceSession(
            path,
            options,
            providers=[(name, PROVIDER_OPTIONS[name]) if name in PROVIDER_OPTIONS else name for name in providers],
        )
    except onnxruntime_failures() as error:
        raise InputError(f"{path} is no ONNX file that can run here ({error}); export or copy it again.") from error


def openvino_config(precision: str, threads: int | None) -> dict[str, str]:
    """How OpenVINO is to compile a model for the CPU."""
    config = {"INFERENCE_PRECISION_HINT": OPENVINO_PRECISIONS[precision], "PERFORMANCE_HINT": "LATENCY"}
    return config if threads is None else config | {"INFERENCE_NUM_THREADS": str(threads)}


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
            core = openvino.Core()
            model = core.read_model(str(self.path))
            self._compiled = core.compile_model(model, "CPU", openvino_config(precision, threads))
        except RuntimeError as error:
            raise InputError(f"{path} is no ONNX file that OpenVINO can run here ({error}).") from error
        inputs = self._compiled.inputs
        if len(inputs) != 1 or inputs[0].get_element_type().to_dtype() not in NUMPY_TYPES.values():
            found = ", ".join(f"{one.get_any_name()}: {one.get_element_type().get_type_name()}" for one in inputs)
            raise InputError(f"{self.path} takes {found}; one floating-point image input is expected.")
        shape = tuple(size.get_length() if size.is_static else None for size in inputs[0].get_partial_shape())
        self._takes = ImageInput(dtype=inputs[0].get_element_type().to_dtype().type, shape=shape)
        self._request = self._compiled.create_infer_request()
        noted = model.get_rt_info()
        self.described: Mapping[str, str] = (
            {key: value.astype(str) for key, value in noted["framework"].items()} if "framework" in noted else {}
        )
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
        self._takes.check(images, str(self.path))
        return self._request.infer([images], share_inputs=True)[0]

    def bind(self, images: np.ndarray) -> Callable[[], object]:
        """A call that runs `images`."""
        return partial(self, images)


OPENVINO_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
