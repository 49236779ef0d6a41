"""Engines of a bundle: each built from a verified ONNX file, and looked into where the GPU that it is for is here.

Needs no torch, so that they can be built where they are to run.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from export.attestation import Attestation, attest_engine
from export.bundle import ArtifactEntry, EngineRecord
from export.engine_spec import EngineSpec
from export.engines import engine_from_onnx
from export.runtimes import ORT_CPU, TENSORRT, precision_of_products
from flora.errors import FloraError


class Source(Protocol):
    """The ONNX file of a bundle that an engine is built from, and what its model is called."""

    @property
    def path(self) -> str: ...

    @property
    def precision(self) -> str: ...

    @property
    def called(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """An engine, the ONNX file that it was built from, and what its products are computed in, or why nobody saw it."""

    source: Source
    record: EngineRecord
    attestation: Attestation | None = None
    unseen: str = "it was built for a device that is not here"

    @property
    def path(self) -> str:
        return _path(self.record.backend, self.source)

    @property
    def of_products(self) -> str:
        """The precision that its products should be computed in."""
        return precision_of_products(self.source.precision)

    def entry(
        self, source: ArtifactEntry, folder: Path, files: Mapping[str, str], unmet: Sequence[str]
    ) -> ArtifactEntry:
        """What the manifest keeps of it; `source` is what it keeps of the ONNX file, `unmet` what it fell short of."""
        reason = self.unseen if self.attestation is None else "it was not run"
        if source.status == "failed":
            reason += f"; its ONNX file failed: {source.reason}"
        return source.model_copy(
            update={
                "name": f"{self.source.called}, {self.record.backend}",
                "path": self.path,
                "kind": "engine",
                "runtime": ORT_CPU,
                "role": "candidate",
                "status": "failed" if unmet else "built, not run",
                "reason": "; ".join(unmet) or reason,
                "certified": False,
                "sha256": files[self.path],
                "size_bytes": (folder / self.path).stat().st_size,
                "spec": self.record,
                "parts": {},
                "attestation": self.attestation,
            }
        )


def build_engine(spec: EngineSpec, source: Source, folder: Path, *, timing_cache: Path | None = None) -> BuiltEngine:
    """Build the engine of the bundle `folder` from one of its files."""
    path = folder / _path(spec.backend, source)
    started = time.monotonic()
    engine_from_onnx(folder / source.path, path, spec, timing_cache=timing_cache)
    record = EngineRecord.of(
        spec,
        source=source.path,
        timing_cache=timing_cache is not None and spec.backend == TENSORRT,
        build_seconds=round(time.monotonic() - started, 2),
    )
    if spec.backend != TENSORRT:
        return BuiltEngine(source=source, record=record)
    try:  # on the GPU that it was built for, which is present
        attestation = attest_engine(path, source=folder / source.path, trusted=True)  # it was built right here
    except FloraError as error:
        return BuiltEngine(source=source, record=record, unseen=f"what it computes in could not be seen: {error}")
    return BuiltEngine(source=source, record=record, attestation=attestation)


def _path(backend: str, source: Source) -> str:
    return f"engines/model-{source.precision}-{backend}.engine"
