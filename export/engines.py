"""From an ONNX file to an engine, for TensorRT-RTX and for TensorRT through one code path.

TensorRT-RTX builds ahead of time, without a GPU, for each of the compute capabilities it is asked for; TensorRT builds
for the GPU that is present. Networks are strongly typed: precision is what the ONNX file says. An engine is a pure
file, readable by any tool of the same version.
"""

import importlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from flora.artifact import new_file
from flora.errors import BackendMissingError, FloraError, InputError, near_matches

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
EXTRAS = {"tensorrt-rtx": "rtx", "tensorrt": "gpu"}
COMPUTE_CAPABILITIES = {"tensorrt-rtx": ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"), "tensorrt": ()}
DEFAULT_COMPUTE_CAPABILITIES = {"tensorrt-rtx": ("sm80", "sm86", "sm89", "sm120"), "tensorrt": ()}
COMPUTE_CAPABILITIES_OF = {"fp8": ("sm89", "sm120", "sm121"), "bf16": ("sm80", "sm86", "sm89", "sm120", "sm121")}
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """What to build: the batch profile, and for TensorRT-RTX the GPUs (all of sm80 to sm120 unless named).

    TensorRT builds for the present GPU, so it takes no compute capabilities.
    """

    backend: str
    min_batch: int = 1
    opt_batch: int = 8
    max_batch: int = 64
    compute_capabilities: tuple[str, ...] | None = None
    workspace_mib: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in MODULES:
            hint = near_matches(self.backend, MODULES)
            raise InputError(f"{self.backend!r} is no engine backend; give {' or '.join(MODULES)}.{hint}")
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch:
            raise InputError(
                f"The batch profile {self.min_batch}/{self.opt_batch}/{self.max_batch} is not min <= opt <= max from 1."
            )
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise InputError(f"The workspace must be at least 1 MiB, got {self.workspace_mib}.")
        if self.compute_capabilities is None:
            object.__setattr__(self, "compute_capabilities", DEFAULT_COMPUTE_CAPABILITIES[self.backend])
        self._check_compute_capabilities()

    def fit_for(self, precision: str) -> Self:
        """The same for files of this precision: GPUs that cannot compute in it are left out, or refused where named."""
        allowed = COMPUTE_CAPABILITIES_OF.get(precision, self.compute_capabilities)
        if allowed is None or set(self.compute_capabilities or ()) <= set(allowed):
            return self
        if self.compute_capabilities != DEFAULT_COMPUTE_CAPABILITIES[self.backend]:
            raise InputError(
                f"{precision} needs a GPU of {', '.join(allowed)}; got {', '.join(self.compute_capabilities or ())}. "
                "Leave the precision or the others out."
            )
        return replace(self, compute_capabilities=tuple(one for one in self.compute_capabilities if one in allowed))

    def _check_compute_capabilities(self) -> None:
        allowed, given = COMPUTE_CAPABILITIES[self.backend], self.compute_capabilities or ()
        if not allowed and given:
            raise InputError(f"{self.backend} builds for the GPU that is present; give no compute capabilities.")
        if allowed and (not given or len(set(given)) != len(given) or not set(given) <= set(allowed)):
            raise InputError(
                f"{self.backend} builds for {', '.join(allowed)}, each at most once; got {', '.join(given) or 'none'}."
            )


def backend_version(backend: str) -> str:
    """The installed version of an engine backend; `BackendMissingError` where there is none."""
    return backend_module(backend).__version__


def engine_from_onnx(onnx_path: Path, path: Path, spec: EngineSpec) -> None:
    """Build the engine of `spec` from an ONNX file with one image input whose first dimension is the batch."""
    trt = backend_module(spec.backend)
    onnx_path = Path(onnx_path)
    if not onnx_path.is_file():
        raise InputError(f"{onnx_path} does not exist; give an ONNX file.")
    logger = collecting_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    _parse(trt, network, logger, onnx_path)
    _check_input(network, spec, onnx_path)
    config = _config(trt, builder, network, spec)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise FloraError(
            f"{spec.backend} {trt.__version__} built no engine from {onnx_path}: {_last(logger.errors)} "
            "Check the batch profile, the opset (20 to 22) and the precision of the file."
        )
    with new_file(path) as partial:
        partial.write_bytes(plan)


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


def collecting_logger(trt: ModuleType) -> Any:
    """A logger that keeps error messages and prints nothing; its base class exists only once a backend is there."""

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

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
    images = network.get_input(0)
    batches = (spec.min_batch, spec.opt_batch, spec.max_batch)
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
    if batch >= 0 and {spec.min_batch, spec.opt_batch, spec.max_batch} != {batch}:
        raise InputError(f"{onnx_path} has a fixed batch of {batch}; give {batch} as min, opt and max.")


def _last(errors: list[str]) -> str:
    text = errors[-1] if errors else "no reason was given"
    return re.sub(r"\s+", " ", text).strip().rstrip(".") + "."
