"""From an ONNX file to an engine, for TensorRT-RTX and for TensorRT through one code path.

TensorRT-RTX builds ahead of time, without a GPU, for each of the compute capabilities it is asked for; TensorRT builds
for the GPU that is present. Networks are strongly typed: precision is what the ONNX file says. An engine is a pure
file, readable by any tool of the same version.
"""

import importlib
import logging
import re
from collections import deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from export.engine_spec import HARDWARE_LEVELS, RTX, TENSORRT, EngineSpec, named
from export.timing_cache import TimingCache
from flora.artifact import new_file
from flora.errors import BackendMissingError, FloraError, InputError

MODULES = {RTX: "tensorrt_rtx", TENSORRT: "tensorrt"}
EXTRAS = {RTX: "rtx", TENSORRT: "gpu"}
MIB = 2**20
KEPT_MESSAGES = 100
OUT_OF_MEMORY = re.compile(r"out ?of ?memory|insufficient memory|bad_alloc|could not be allocated", re.IGNORECASE)
LITTLE_WORKSPACE = re.compile(r"workspace", re.IGNORECASE)


def backend_version(backend: str) -> str:
    """The installed version of an engine backend; `BackendMissingError` where there is none."""
    return backend_module(backend).__version__


def engine_from_onnx(onnx_path: Path, path: Path, spec: EngineSpec, *, timing_cache: Path | None = None) -> None:
    """Build the engine of `spec` from an ONNX file with one image input whose first dimension is the batch.

    TensorRT times kernels on the GPU; what it has timed is kept in the folder `timing_cache` for the next build.
    """
    trt = backend_module(spec.backend)
    onnx_path = Path(onnx_path)
    if not onnx_path.is_file():
        raise InputError(f"{onnx_path} does not exist; give an ONNX file.")
    logger = collecting_logger(trt)
    logger.forget()
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    _parse(trt, network, logger, onnx_path)
    _check_input(network, spec, onnx_path)
    config = _config(trt, builder, network, spec)
    timings = None
    if timing_cache is not None and spec.backend == TENSORRT:
        timings = TimingCache.of(timing_cache, f"{spec.backend} {trt.__version__}")
        timings.attach(config)
    try:
        plan = builder.build_serialized_network(network, config)
    except MemoryError as error:
        plan = None
        logger.errors.append(f"out of memory ({error})")
    if plan is None:
        raise FloraError(
            f"{spec.backend} {trt.__version__} built no engine from {onnx_path}: {_last(logger.errors)} "
            f"{build_advice([*logger.errors, *logger.warnings], spec)}"
        )
    with new_file(path) as partial:
        partial.write_bytes(plan)
    if timings is not None:
        try:
            timings.keep(config)
        except (OSError, FloraError) as error:  # the engine is there all the same
            logging.getLogger(__name__).warning("What TensorRT timed is not kept in %s: %s", timing_cache, error)


def build_advice(messages: Sequence[str], spec: EngineSpec) -> str:
    """What to do after a build that failed with these messages."""
    if any(OUT_OF_MEMORY.search(message) for message in messages):
        return (
            f"There is not enough memory: lower the workspace (now {_mib(spec.workspace_mib)}) or the largest batch "
            f"(profiles {named(spec.profiles)}), or stop what else uses the GPU."
        )
    if spec.workspace_mib is not None and any(LITTLE_WORKSPACE.search(message) for message in messages):
        return f"The workspace of {spec.workspace_mib} MiB is too small: give more, or leave it open."
    return "Check the batch profile, the opset (20 to 22) and the precision of the file."


def _mib(limit: int | None) -> str:
    return "all there is" if limit is None else f"{limit} MiB"


def backend_module(backend: str) -> ModuleType:
    """The Python module of an engine backend; `BackendMissingError` where there is none."""
    try:
        return importlib.import_module(MODULES[backend])
    except ImportError as error:
        raise BackendMissingError(
            f"{backend} is not installed or does not load ({error}). Run: pip install 'flora-vit[{EXTRAS[backend]}]'"
        ) from error


def _network_flags(trt: ModuleType) -> int:
    """Strongly typed, where that is a choice: TensorRT 11 knows no other network."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


@cache
def collecting_logger(trt: ModuleType) -> Any:
    """The logger of a backend, which keeps the latest errors and warnings and prints nothing.

    There is one in a process: while an engine is open, its library goes on with the logger that it was opened with.
    """

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=KEPT_MESSAGES)
            self.warnings: deque[str] = deque(maxlen=KEPT_MESSAGES)

        def forget(self) -> None:
            self.errors.clear()
            self.warnings.clear()

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(message)

    return Logger()


def _parse(trt: ModuleType, network: Any, logger: Any, onnx_path: Path) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(onnx_path)):
        return
    problems = [_described(parser.get_error(i)) for i in range(parser.num_errors)] or [_last(logger.errors)]
    raise InputError(f"{onnx_path} cannot become an engine: {'; '.join(problems)}")


def _described(error: Any) -> str:
    operator, node = error.node_operator(), error.node_name()
    where = f"operator {operator} (node {node}): " if operator else ""
    return f"{where}{' '.join(error.desc().split())}"


def _config(trt: ModuleType, builder: Any, network: Any, spec: EngineSpec) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the inspector tells precisions
    config.clear_flag(trt.BuilderFlag.TF32)  # FP32 is what the file says, not 10 bits of it
    if spec.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_mib * MIB)
    if spec.compute_capabilities:
        config.num_compute_capabilities = len(spec.compute_capabilities)
        for index, name in enumerate(spec.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)
    if spec.builder_level is not None:
        config.builder_optimization_level = spec.builder_level
    if spec.hardware_compatible is not None:
        level = getattr(trt.HardwareCompatibilityLevel, HARDWARE_LEVELS[spec.hardware_compatible])
        config.hardware_compatibility_level = level
    if spec.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    images = network.get_input(0)
    for batches in spec.profiles:
        profile = builder.create_optimization_profile()
        profile.set_shape(images.name, *((batch, *tuple(images.shape)[1:]) for batch in batches))
        config.add_optimization_profile(profile)
    return config


def _check_input(network: Any, spec: EngineSpec, onnx_path: Path) -> None:
    if network.num_inputs != 1 or network.num_outputs < 1:
        raise InputError(
            f"{onnx_path} cannot become an engine: one image input and an output are expected, it has "
            f"{network.num_inputs} and {network.num_outputs}."
        )
    batch, *size = network.get_input(0).shape
    if any(length < 0 for length in size):
        raise InputError(f"{onnx_path} cannot become an engine: only the batch may be dynamic, got {[batch, *size]}.")
    if batch >= 0 and spec.profiles != ((batch, batch, batch),):
        raise InputError(f"{onnx_path} has a fixed batch of {batch}; give {batch} as min, opt and max, and no others.")


def _last(errors: Sequence[str]) -> str:
    text = errors[-1] if errors else "no reason was given"
    return re.sub(r"\s+", " ", text).strip().rstrip(".") + "."
