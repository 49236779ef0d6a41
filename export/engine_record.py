"""What a bundle keeps of an engine: what it was built for, by what, and where; and why it does not load elsewhere."""

import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from export.device import Gpu, present_gpu
from export.engine_spec import COMPUTE_CAPABILITIES, RTX, TENSORRT, EngineSpec, Profile
from export.engines import backend_version
from flora.errors import BackendMissingError

AMPERE = 80


class EngineRecord(BaseModel):
    """What an engine was built for, and with what, from the ONNX file `source` of the bundle.

    `gpu` is where TensorRT built it; an engine of TensorRT-RTX depends on no GPU but its compute capabilities.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    backend: str
    backend_version: str
    min_batch: int
    opt_batch: int
    max_batch: int
    more_profiles: tuple[Profile, ...] = ()
    compute_capabilities: tuple[str, ...]
    workspace_mib: int | None = None
    builder_level: int | None = None
    hardware_compatible: str | None = None
    version_compatible: bool = False
    timing_cache: bool = False
    build_seconds: float
    gpu: Gpu | None = None

    @classmethod
    def of(cls, spec: EngineSpec, **facts: Any) -> Self:
        """What was just built here."""
        gpu = present_gpu() if spec.backend == TENSORRT else None
        return cls(**asdict(spec), **facts, backend_version=backend_version(spec.backend), gpu=gpu)

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """All batch profiles, the usual one first."""
        return self.spec.profiles

    @property
    def spec(self) -> EngineSpec:
        """What would build it again; `InputError` where that is not possible any more."""
        return EngineSpec(**{field.name: getattr(self, field.name) for field in fields(EngineSpec)})

    def why_not_here(self, bundle: Path) -> str | None:
        """Why the engine of the `bundle` cannot run here, in one sentence with what to type; nothing where it can."""
        try:
            version, gpu = backend_version(self.backend), present_gpu()
        except BackendMissingError as error:
            return str(error)
        if gpu is None:
            return "there is no NVIDIA GPU here"
        because = self.why_rebuild(version, gpu)
        if because is None:
            return None
        command = f"flora export {shlex.quote(str(bundle))} --rebuild-engine"
        if self.backend == RTX and gpu.compute_capability not in self.compute_capabilities:
            if gpu.compute_capability not in COMPUTE_CAPABILITIES[RTX]:
                return f"{because}, which {RTX} knows no kernels for; export it with --to {TENSORRT}"
            command += f" --compute-capabilities {gpu.compute_capability}"
        return f"rebuild needed, because {because}; run {command}"

    def why_rebuild(self, version: str, gpu: Gpu) -> str | None:
        """Why the engine would not load in this version of its library on this GPU, or nothing."""
        older = _numbers(version) < _numbers(self.backend_version)
        if version != self.backend_version and (older or not self.version_compatible):
            return f"it was built by {self.backend} {self.backend_version} and {version} is here"
        if self.backend == RTX:
            if gpu.compute_capability in self.compute_capabilities:
                return None
            return f"it was built for {', '.join(self.compute_capabilities)} and {_called(gpu)} is here"
        return None if self.gpu is None else self._why_on(gpu, self.gpu)

    def _why_on(self, gpu: Gpu, built_on: Gpu) -> str | None:
        fits = {
            None: (gpu.name, gpu.compute_capability) == (built_on.name, built_on.compute_capability),
            "same-capability": gpu.compute_capability == built_on.compute_capability,
            "ampere-plus": int(gpu.compute_capability.removeprefix("sm")) >= AMPERE,
        }
        if not fits[self.hardware_compatible]:
            return f"it was built on {_called(built_on)} and {_called(gpu)} is here"
        if _numbers(gpu.cuda) < _numbers(built_on.cuda):
            return f"it was built with a driver for CUDA {built_on.cuda} and the one here is for CUDA {gpu.cuda}"
        if built_on.driver and gpu.driver and _numbers(gpu.driver) < _numbers(built_on.driver):
            return f"it was built with driver {built_on.driver} and the older {gpu.driver} is here"
        return None


def _called(gpu: Gpu) -> str:
    return f"{gpu.name} ({gpu.compute_capability})"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
