"""Engines of a bundle: each built from a verified ONNX file, and looked into where the GPU that it is for is here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.attestation import Attestation, attest_engine
from export.bundle import ArtifactEntry, EngineRecord
from export.engines import EngineSpec, engine_from_onnx
from export.runtimes import ORT_CPU, TENSORRT
from flora.errors import FloraError
from flora.pipeline.proof import Exported


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """An engine, the ONNX file that it was built from, and what its products are computed in, or why nobody saw it."""

    spec: EngineSpec
    source: Exported
    attestation: Attestation | None = None
    unseen: str = "it was built for a device that is not here"

    @property
    def path(self) -> str:
        return _path(self.spec, self.source)

    @property
    def of_products(self) -> str:
        """The precision that its products should be computed in."""
        return self.source.of_products

    def entry(
        self, source: ArtifactEntry, folder: Path, files: Mapping[str, str], unmet: Sequence[str]
    ) -> ArtifactEntry:
        """What the manifest keeps of it; `source` is what it keeps of the ONNX file, `unmet` what it fell short of."""
        reason = self.unseen if self.attestation is None else "it was not run"
        if source.status == "failed":
            reason += f"; its ONNX file failed: {source.reason}"
        return source.model_copy(
            update={
                "name": f"{self.source.called}, {self.spec.backend}",
                "path": self.path,
                "kind": "engine",
                "runtime": ORT_CPU,
                "role": "candidate",
                "status": "failed" if unmet else "built, not run",
                "reason": "; ".join(unmet) or reason,
                "certified": False,
                "sha256": files[self.path],
                "size_bytes": (folder / self.path).stat().st_size,
                "spec": EngineRecord.of(self.spec),
                "attestation": self.attestation,
            }
        )


def build_engine(spec: EngineSpec, source: Exported, folder: Path) -> BuiltEngine:
    """Build the engine of the bundle `folder` from one of its files."""
    path = folder / _path(spec, source)
    engine_from_onnx(folder / source.path, path, spec)
    if spec.backend != TENSORRT:
        return BuiltEngine(spec=spec, source=source)
    try:  # on the GPU that it was built for, which is present
        return BuiltEngine(spec=spec, source=source, attestation=attest_engine(path))
    except FloraError as error:
        return BuiltEngine(spec=spec, source=source, unseen=f"what it computes in could not be seen: {error}")


def _path(spec: EngineSpec, source: Exported) -> str:
    return f"engines/model-{source.precision}-{spec.backend}.engine"
