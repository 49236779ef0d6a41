"""From a compact model to a verified bundle: export, engines, verification, latency, recommendation, manifest."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import nn

from export.benchmark import LatencyStats, paired_latency
from export.bundle import (
    GOLDEN,
    MANIFEST,
    ArtifactEntry,
    Bundle,
    EngineRecord,
    Manifest,
    hash_files,
    load_bundle,
    write_golden,
)
from export.engines import EngineSpec, backend_version, engine_from_onnx
from export.images import ImageSet
from export.onnx import onnx_from_module
from export.runners import Runner
from export.runtimes import ORT_CPU, check_loads_onnx, open_runner, runtime_called, runtime_version
from export.torch_runner import TorchRunner
from export.verify import Stage, VerifyReport, thresholds_with_drop, verify
from flora.artifact import check_replaceable, new_folder
from flora.errors import InputError
from flora.lowrank.checkpoint import (
    LoadedModel,
    content_digest,
    is_supernet_folder,
    load_model_folder,
    load_reference,
    load_supernet,
    save_model,
)
from flora.lowrank.pivot import pivot_layers
from flora.lowrank.targets import trace_cost
from flora.lowrank.weights import weights_digest
from flora.pipeline.compact import chosen_ranks, compact_from_supernet
from flora.pipeline.images import (
    Unlabelled,
    certified_record,
    check_classes,
    identity,
    labels_are_classes,
    open_images,
)
from flora.pipeline.job import OnStart
from flora.pipeline.notes import AskedLatency, note_on_pivots, notes_on
from flora.provenance import device_facts, gpu_facts, now, versions
from flora.resume import SETTINGS, Job
from flora.training.data import TimmImages

MODEL_FOLDER = "model"
GOLDEN_IMAGES = 8
TORCH_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export and how to prove it; `batches` are the smallest, usual and largest one.

    With `certifies` the images must be none that the model was made with; without, they are those it was chosen by,
    and their labels count only where they are the model's classes. `runtime` runs the ONNX files, here and in later
    verifications.
    """

    eval_data: str | None
    certifies: bool = True
    runtime: str = ORT_CPU
    asked: AskedLatency | None = None
    targets: tuple[str, ...] = ("onnx",)
    reference: Path | None = None
    max_drop: float = 1.0
    opset: int = 20
    batches: tuple[int, int, int] = (1, 8, 64)
    compute_capabilities: tuple[str, ...] = ()
    repeats: int = 20
    threads: int | None = None
    command: tuple[str, ...] = ()

    def judged_by(self, selection: str) -> "ExportRequest":
        """The same, on the `selection` images where no evaluation images are given."""
        return self if self.eval_data else replace(self, eval_data=selection, certifies=False)

    def engine_specs(self) -> list[EngineSpec]:
        """The engines asked for; `BackendMissingError` where a builder is not installed."""
        if self.compute_capabilities and "tensorrt-rtx" not in self.targets:
            raise InputError("Compute capabilities are chosen for tensorrt-rtx only, which is not among the targets.")
        smallest, usual, largest = self.batches
        specs = [
            EngineSpec(
                backend=target,
                min_batch=smallest,
                opt_batch=usual,
                max_batch=largest,
                compute_capabilities=(self.compute_capabilities or None) if target == "tensorrt-rtx" else None,
            )
            for target in self.targets
            if target != "onnx"
        ]
        for spec in specs:
            backend_version(spec.backend)
        check_loads_onnx(self.runtime)
        runtime_version(self.runtime)
        return specs


@dataclass(frozen=True, kw_only=True)
class _Exported:
    """One model of the bundle: the module, its ONNX file, and the names of its stages and rows."""

    name: str
    runtime: str
    role: str
    model: LoadedModel
    path: str
    module: nn.Module
    stages: list[str] = field(default_factory=list)

    @property
    def torch_name(self) -> str:
        return f"{self.name}, torch"

    @property
    def onnx_name(self) -> str:
        return f"{self.name}, {runtime_called(self.runtime).label}"


def load_exportable(path: Path, ranks: Path | None = None) -> LoadedModel:
    """A compact (or dense) model folder, or a supernet folder cut at `ranks`."""
    if not is_supernet_folder(path):
        if ranks is not None:
            raise InputError(f"--ranks cuts a supernet folder; {path} is none. A compact model has its ranks already.")
        return load_model_folder(path)
    if ranks is None:
        raise InputError(f"{path} is a supernet folder: give --ranks FILE, or run flora materialize first.")
    supernet = load_supernet(path)
    return compact_from_supernet(supernet, chosen_ranks(supernet, file=ranks))


def export_job(
    source: LoadedModel, request: ExportRequest, out: Path, *, on_start: OnStart, on_step: Callable[[str], None]
) -> None:
    """Write the bundle `out` of a model folder; nothing is done where it is there by the same settings."""
    assert source.folder is not None
    dense = load_reference(source.config, request.reference)
    assert request.eval_data is not None
    images = TimmImages(request.eval_data, source.config.preprocessing)
    options = {name: value for name, value in asdict(request).items() if name not in _NO_SETTINGS}
    job = Job(
        settings={
            "model": content_digest(source.folder),
            "reference": weights_digest(dense.module) if dense else None,
            "evaluation": identity(images, images.record()),
            **options,
        }
    )
    done = _is_there(job, out)
    on_start(done)
    if not done:
        export_bundle(source, request, out, job=job, on_step=on_step)


# Fields of a request that say where something lies, or how it was asked for.
_NO_SETTINGS = ("eval_data", "reference", "command")


def _is_there(job: Job, out: Path) -> bool:
    """Whether `out` is the bundle of this job; a damaged one is made anew."""
    try:
        load_bundle(out)
        return job.is_in(out)
    except InputError:
        return False


def export_bundle(
    source: LoadedModel,
    request: ExportRequest,
    out: Path,
    *,
    job: Job | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Bundle:
    """Write the bundle folder `out` and return it; a failed gate is recorded in the manifest, not raised.

    What can be refused is refused before anything is built: missing backends, images, references. The settings of the
    `job` that asks for the bundle lie in it.
    """
    check_replaceable(out, marker=MANIFEST)
    specs = request.engine_specs()
    if request.reference is not None and not source.config.ranks:
        raise InputError("--reference is what a factorized model is compared with; this model is dense itself.")
    dense = load_reference(source.config, request.reference)
    images = _images_to_judge_by(request, source)
    record = certified_record(images, {**source.config.image_sets} if request.certifies else {})
    name = "factorized" if source.config.ranks else "dense"
    module, not_pivoted = _pivoted(source)
    compact = _Exported(
        name=name,
        runtime=request.runtime,
        role="candidate",
        model=source,
        path="onnx/model-fp32.onnx",
        module=module,
    )
    exported = [compact]
    if dense is not None:
        yardstick = _Exported(
            name="dense",
            runtime=request.runtime,
            role="yardstick",
            model=dense,
            path="onnx/dense-fp32.onnx",
            module=dense.module,
        )
        exported.insert(0, yardstick)
    with new_folder(out, marker=MANIFEST) as folder:
        on_step("writing the compact model")
        save_model(folder / MODEL_FOLDER, source.module, source.config)
        for one in exported:
            on_step(f"exporting the {one.name} model to ONNX")
            _export_onnx(one, folder, request)
        for spec in specs:
            on_step(f"building the {spec.backend} engine")
            engine_from_onnx(folder / compact.path, folder / _engine_path(spec), spec)
        report, latency = _prove(exported, folder, images, request, on_step)
        if job is not None:
            job.save(folder / SETTINGS)
        files = hash_files(folder)
        entries = [_onnx_entry(one, folder, files, report) for one in exported]
        entries += [_engine_entry(spec, folder, files, entries[-1]) for spec in specs]
        recommended, reason = _recommend(entries, latency, factorized=bool(source.config.ranks))
        notes = list(notes_on(source.config, dense, report, record, certifies=request.certifies))
        if not_pivoted:
            notes.insert(0, note_on_pivots(not_pivoted))
        if request.asked is not None:
            notes.insert(0, request.asked.outcome(latency[compact.onnx_name], compact.onnx_name))
        manifest = Manifest(
            model=source.config.model,
            class_names=source.config.class_names and list(source.config.class_names),
            preprocessing=source.config.preprocessing,
            files=files,
            artifacts=entries,
            recommended=recommended,
            recommendation_reason=reason,
            max_drop=request.max_drop,
            verification=report,
            latency=latency,
            image_sets=({"evaluation": record} if request.certifies else {}) | {**source.config.image_sets},
            versions=versions(),
            device=device_facts()
            | (gpu_facts() if runtime_called(request.runtime).on_gpu else {})
            | ({"threads": str(request.threads)} if request.threads else {}),
            command=list(request.command),
            created=now(),
            notes=notes,
        )
        manifest.save(folder / MANIFEST)
    return load_bundle(out)


def _images_to_judge_by(request: ExportRequest, source: LoadedModel) -> ImageSet:
    """The evaluation images, which must show the model's classes, or else the selection images."""
    assert request.eval_data is not None
    images = open_images(request.eval_data, source.config.preprocessing)
    classes = getattr(source.module, "num_classes", None)
    if not request.certifies and not labels_are_classes(images, classes):
        return Unlabelled(images)
    check_classes(images, classes)
    return images


def _pivoted(source: LoadedModel) -> tuple[nn.Module, list[str]]:
    """The module to export, and the layers that should be pivoted in it and could not be."""
    if not source.config.pivoted:
        return source.module, []
    module = copy.deepcopy(source.module)
    return module, pivot_layers(module, source.config.pivoted)


def _engine_path(spec: EngineSpec) -> str:
    return f"engines/model-fp32-{spec.backend}.engine"


def _export_onnx(exported: _Exported, folder: Path, request: ExportRequest) -> None:
    onnx_from_module(
        exported.module,
        folder / exported.path,
        preprocessing=exported.model.config.preprocessing,
        class_names=exported.model.config.class_names,
        opset=request.opset,
        max_batch=request.batches[2],
    )


def _prove(
    exported: list[_Exported],
    folder: Path,
    images: ImageSet,
    request: ExportRequest,
    on_step: Callable[[str], None],
) -> tuple[VerifyReport, dict[str, LatencyStats]]:
    """Verify every step on all images, write the golden outputs, and measure latency at the usual batch.

    The chain: dense, dense on ONNX Runtime; factorized against dense; factorized on ONNX Runtime at two batches. The
    latency of everything is compared with the yardstick on ONNX Runtime, or without one with the model itself.
    """
    smallest, usual, _ = request.batches
    golden, _ = next(iter(images.batches(GOLDEN_IMAGES)))
    stages: list[Stage] = []
    runners: dict[str, Runner] = {}
    golden_logits: dict[str, np.ndarray] = {}
    with ExitStack() as opened:
        for one in exported:
            torch_runner = opened.enter_context(TorchRunner(one.model.module, name=one.torch_name))
            onnx_runner = opened.enter_context(
                open_runner(request.runtime, folder / one.path, name=one.onnx_name, threads=request.threads)
            )
            first = stages[0].name if stages else None
            chain: list[tuple[str, Runner, int, str, str | None]] = [
                (one.torch_name, torch_runner, TORCH_BATCH, "lowrank", first)
            ]
            for batch in dict.fromkeys((smallest, usual) if one.role == "candidate" else (usual,)):
                chain.append((f"{one.onnx_name}, batch {batch}", onnx_runner, batch, "fp32", chain[-1][0]))
            for name, runner, batch, kind, compared_with in chain:
                stages.append(Stage(name=name, runner=runner, batch_size=batch, kind=kind, compared_with=compared_with))
                one.stages.append(name)
            runners[one.onnx_name] = onnx_runner
            runners[one.torch_name] = torch_runner
            golden_logits[one.path] = torch_runner(golden)
        report = verify(
            stages,
            images,
            thresholds=thresholds_with_drop(request.max_drop),
            progress=lambda done, total: on_step(f"verifying every step: {done} of {total} images"),
        )
        on_step("measuring latency")
        write_golden(folder / GOLDEN, golden, golden_logits)
        batch_images = np.resize(golden, (usual, *golden.shape[1:]))
        return report, paired_latency(runners, batch_images, repeats=request.repeats)


def _onnx_entry(exported: _Exported, folder: Path, files: dict[str, str], report: VerifyReport) -> ArtifactEntry:
    failed = [stage for stage in report.stages if stage.name in exported.stages and not stage.passed]
    cost = trace_cost(exported.module, [], exported.model.config.preprocessing.input_size)
    return ArtifactEntry(
        name=exported.onnx_name,
        path=exported.path,
        kind="onnx",
        runtime=exported.runtime,
        precision="fp32",
        role=exported.role,
        status="failed" if failed else "verified",
        reason="; ".join(f"{stage.name}: {', '.join(stage.failures)}" for stage in failed) or None,
        sha256=files[exported.path],
        size_bytes=(folder / exported.path).stat().st_size,
        macs=cost.dense_macs,
        params=cost.dense_params,
    )


def _engine_entry(spec: EngineSpec, folder: Path, files: dict[str, str], compact: ArtifactEntry) -> ArtifactEntry:
    path = _engine_path(spec)
    return ArtifactEntry(
        name=compact.name.replace(runtime_called(compact.runtime).label, spec.backend),
        path=path,
        kind="engine",
        precision="fp32",
        role="candidate",
        status="built, not run",
        reason="built for a device that is not here",
        sha256=files[path],
        size_bytes=(folder / path).stat().st_size,
        macs=compact.macs,
        params=compact.params,
        spec=EngineRecord.of(spec),
    )


def _recommend(
    entries: list[ArtifactEntry], latency: dict[str, LatencyStats], *, factorized: bool
) -> tuple[str | None, str]:
    """The fastest artefact that ran here and passed its gate, and why; the yardstick when nothing beats it."""
    verified = [entry for entry in entries if entry.status == "verified"]
    if not verified:
        return None, "nothing passed its gate"
    if not any(entry.role == "yardstick" for entry in entries):
        if factorized:
            return None, "without the dense model nothing is known of what low rank costs; name it with --reference"
        return verified[0].name, "it passed every gate"
    best = min(verified, key=lambda entry: latency[entry.name].ratio)
    if best.role == "yardstick":
        return best.name, "the factorized model is slower here or failed its gate: ship the dense one"
    return best.name, f"it passed every gate and takes {latency[best.name].ratio:.2f} of the dense model's time"
