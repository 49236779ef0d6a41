"""Building the engines of a bundle anew, from the ONNX files in it, where they are to run. Needs no torch."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from export.attestation import unmet
from export.bundle import MANIFEST, REPORT, ArtifactEntry, Bundle, check_hashes, hash_files, load_bundle
from export.device import required_gpu
from export.engine_spec import AS_USUAL, RTX, BuildOptions, EngineSpec
from export.engines import backend_version
from export.report.page import add_report
from export.runtimes import TENSORRT
from flora.artifact import new_folder
from flora.errors import GateFailedError, InputError
from flora.pipeline.engines import build_engine
from flora.provenance import now

REBUILT = "Engines were rebuilt"


@dataclass(frozen=True, kw_only=True)
class RebuildRequest:
    """How to build; what is None or empty stays as it was."""

    batches: tuple[int, int, int] | None = None
    compute_capabilities: tuple[str, ...] = ()
    build: BuildOptions = AS_USUAL
    timing_cache: Path | None = None
    command: tuple[str, ...] = ()

    def changed(self, spec: EngineSpec) -> EngineSpec:
        """The engine as it is to be now."""
        given = self.build.taken_by(spec.backend)
        changes: dict[str, Any] = {
            name: value for name, value in asdict(given).items() if value != getattr(AS_USUAL, name)
        }
        if self.batches is not None:
            changes |= dict(zip(("min_batch", "opt_batch", "max_batch"), self.batches, strict=True))
        if self.compute_capabilities and spec.backend == RTX:
            changes["compute_capabilities"] = self.compute_capabilities
        return replace(spec, **changes)


@dataclass(frozen=True, kw_only=True)
class _Source:
    path: str
    precision: str
    called: str


def rebuild_engines(
    folder: Path, request: RebuildRequest, *, on_step: Callable[[str], None] = lambda step: None
) -> Bundle:
    """Build every engine of the bundle `folder` anew and put the bundle with them in its place.

    All other files must be as they were exported, else `GateFailedError`; where a build fails, nothing is replaced.
    """
    bundle = load_bundle(folder)
    old = {entry.name: entry for entry in bundle.manifest.artifacts if entry.spec is not None}
    specs = _specs(old, request, folder)
    engine_files = tuple(entry.path for entry in old.values())
    if problems := [line for line in check_hashes(bundle) if not line.startswith(engine_files)]:
        raise GateFailedError(f"{folder} is not what was exported: {'; '.join(problems)}. Nothing of it was built.")
    with new_folder(folder, marker=MANIFEST) as partial:
        for name in bundle.manifest.files:
            if name not in (*engine_files, REPORT):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(folder / name, partial / name)
        built = {}
        for name, entry in old.items():
            assert entry.spec is not None
            on_step(f"building {name}")
            source = _Source(
                path=entry.spec.source, precision=entry.precision, called=name.removesuffix(f", {entry.spec.backend}")
            )
            built[name] = build_engine(specs[name], source, partial, timing_cache=request.timing_cache)
        manifest = bundle.manifest
        files = hash_files(partial)
        sources = {entry.path: entry for entry in manifest.artifacts}
        entries = {
            name: one.entry(
                sources[one.source.path], partial, files, unmet(manifest.require, one.of_products, one.attestation)
            )
            for name, one in built.items()
        }
        failed = [entry for entry in entries.values() if entry.status == "failed"]
        kept = [line for line in manifest.unmet if not line.startswith(tuple(f"{name}:" for name in old))]
        notes = [note for note in manifest.notes if not note.startswith(REBUILT)]
        manifest = manifest.model_copy(
            update={
                "artifacts": [entries.get(entry.name, entry) for entry in manifest.artifacts],
                "files": files,
                "unmet": [*kept, *(f"{entry.name}: {entry.reason}" for entry in failed)],
                "notes": [*notes, f"{REBUILT} at {now()} by: {' '.join(request.command) or 'rebuild_engines'}"],
            }
        )
        add_report(manifest, partial).save(partial / MANIFEST)
    return load_bundle(folder)


def _specs(old: dict[str, ArtifactEntry], request: RebuildRequest, folder: Path) -> dict[str, EngineSpec]:
    """What to build; refused where it cannot be, before anything is."""
    specs = {
        name: request.changed(entry.spec.spec).fit_for(entry.precision)
        for name, entry in old.items()
        if entry.spec is not None
    }
    backends = {spec.backend for spec in specs.values()}
    if not backends:
        raise InputError(f"{folder} holds no engines to rebuild; flora export MODEL --to tensorrt makes some.")
    for given, backend in ((request.build.for_tensorrt, TENSORRT), (request.compute_capabilities, RTX)):
        if given and backend not in backends:
            named = ", ".join(given).replace("_", " ")
            raise InputError(f"{named}: for {backend} only, and {folder} holds no such engine.")
    for backend in backends:
        backend_version(backend)
        if backend == TENSORRT:
            required_gpu(f"An engine of {TENSORRT}")
    return specs
