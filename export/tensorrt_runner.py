"""Runs an engine on the GPU that it was built for, through NVIDIA's own bindings; no torch is needed.

Never run by us: no GPU was at hand. The tests drive it through a fake of the two libraries; those marked `gpu` are for
those who have one.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np

from export.device import cuda_runtime
from export.engine_spec import TENSORRT, Profile, named, profile_for
from export.engines import backend_module, collecting_logger
from flora.errors import FloraError, InputError


class TensorRtRunner:
    """Runs the engine file `path`, with one image input and one output; a call copies both ways and waits.

    Of the engine's batch profiles it takes the one that is optimized for what is nearest to the batch. An engine for
    several versions brings code of its own, which is run only where the file is `trusted`.
    """

    def __init__(self, path: Path, *, name: str | None = None, backend: str = TENSORRT, trusted: bool = False) -> None:
        self.path = Path(path)
        self.name = name or self.path.name
        self.described: Mapping[str, str] = {}
        trt, self._cuda = backend_module(backend), cuda_runtime()
        if not self.path.is_file():
            raise InputError(f"{path} does not exist; give an engine file.")
        self._logger = collecting_logger(trt)
        self._logger.forget()
        self._runtime = trt.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = trusted
        self._engine = self._runtime.deserialize_cuda_engine(self.path.read_bytes())
        if self._engine is None:
            raise FloraError(
                f"{path} does not load in {backend} {trt.__version__}: {self._said()}. "
                "An engine runs on the GPU and version that it was built with; build it again from the ONNX file."
            )
        self._input, self._output = self._names(trt)
        self._dtypes = {
            tensor: np.dtype(trt.nptype(self._engine.get_tensor_dtype(tensor)))
            for tensor in (self._input, self._output)
        }
        self._shapes = [
            [tuple(shape) for shape in self._engine.get_tensor_profile_shape(self._input, number)]
            for number in range(self._engine.num_optimization_profiles)
        ]
        self._profile = 0
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise FloraError(
                f"{path} loads, and no context to run it in can be made: {self._said()}. Most likely the GPU has too "
                "little memory left; end what else runs there, or rebuild the engine with a smaller largest batch."
            )
        self._stream = self._call("cudaStreamCreate")
        self._buffers: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()
        self._result_shape: tuple[int, ...] = ()
        self.provider = f"{'TensorRT' if backend == TENSORRT else 'TensorRT-RTX'} {trt.__version__}"
        self._json = trt.LayerInformationFormat.JSON

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._free()
        if self._context is not None:
            self._call("cudaStreamDestroy", self._stream)
        self._context = self._engine = self._runtime = None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits [B, classes] of images [B, C, H, W], in the types of the engine."""
        self._send(images)
        self._execute()
        result = np.empty(self._result_shape, self._dtypes[self._output])
        down = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(result.ctypes.data, self._buffers[self._output], result.nbytes, down)
        self._call("cudaStreamSynchronize", self._stream)
        return result

    def bind(self, images: np.ndarray) -> Callable[[], object]:
        """A call that runs `images` and waits; they lie on the GPU already, and what comes out stays there.

        Another call of this runner with other images takes their place.
        """
        self._send(images)

        def run() -> None:
            self._execute()
            self._call("cudaStreamSynchronize", self._stream)

        return run

    def inspected(self) -> str:
        """What TensorRT's engine inspector tells of the engine's layers, as JSON."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return inspector.get_engine_information(self._json)

    def _send(self, images: np.ndarray) -> None:
        self._check(images)
        if images.shape != self._shape:
            self._allocate(images)
        images = np.ascontiguousarray(images)
        up = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(self._buffers[self._input], images.ctypes.data, images.nbytes, up)
        self._call("cudaStreamSynchronize", self._stream)  # before the images may be gone

    def _execute(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise FloraError(f"{self.path} failed to run: {self._said()}.")

    def _said(self) -> str:
        return "; ".join(self._logger.errors) or "no reason was given"

    def _names(self, trt: ModuleType) -> tuple[str, str]:
        tensors = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = [one for one in tensors if self._engine.get_tensor_mode(one) == trt.TensorIOMode.INPUT]
        outputs = [one for one in tensors if one not in inputs]
        if len(inputs) != 1 or len(outputs) != 1:
            raise InputError(
                f"{self.path} has {len(inputs)} inputs and {len(outputs)} outputs; one image input and one output are "
                "expected."
            )
        return inputs[0], outputs[0]

    def _check(self, images: np.ndarray) -> None:
        if self._context is None:
            raise InputError(f"The runner of {self.path} is closed; open a new one.")
        smallest, _, largest = self._shapes[0]
        if images.dtype != self._dtypes[self._input] or images.shape[1:] != smallest[1:]:
            raise InputError(
                f"{self.path} takes {self._dtypes[self._input]} images of shapes {list(smallest)} to {list(largest)}, "
                f"got {images.dtype} {list(images.shape)}; preprocess the images with the settings of this model."
            )
        if profile_for(len(images), self.profiles) is None:
            raise InputError(
                f"{self.path} takes batches of its profiles {named(self.profiles)} (min/opt/max), got {len(images)} "
                "images; build it with a profile for this batch."
            )

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The smallest, usual and largest batch of each optimization profile."""
        return tuple((low[0], usual[0], high[0]) for low, usual, high in self._shapes)

    def _allocate(self, images: np.ndarray) -> None:
        """Buffers for images of this shape, which further calls use again."""
        self._free()
        profile = profile_for(len(images), self.profiles)
        if profile is not None and profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, int(self._stream)):
                raise FloraError(f"{self.path} does not take its profile {profile}: {self._said()}.")
            self._profile = profile
        self._context.set_input_shape(self._input, images.shape)
        self._result_shape = tuple(self._context.get_tensor_shape(self._output))
        result_bytes = math.prod(self._result_shape) * self._dtypes[self._output].itemsize
        for tensor, size in ((self._input, images.nbytes), (self._output, result_bytes)):
            self._buffers[tensor] = self._call("cudaMalloc", size)
            self._context.set_tensor_address(tensor, self._buffers[tensor])
        self._shape = images.shape

    def _free(self) -> None:
        for address in self._buffers.values():
            self._call("cudaFree", address)
        self._buffers, self._shape = {}, ()

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        self._call("cudaMemcpyAsync", target, source, size, kind, self._stream)

    def _call(self, function: str, *args: Any) -> Any:
        """What a function of CUDA's runtime gives; `FloraError` with its code where it fails."""
        error, *values = getattr(self._cuda, function)(*args)
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise FloraError(f"{function} failed for {self.path} with {error}. Is the GPU there, with memory left?")
        return values[0] if values else None
