"""From a compact model to a verified bundle: export, precisions, engines, verification, recommendation, manifest."""

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from export.attestation import Requirement, attest
from export.bundle import (
    GOLDEN,
    MANIFEST,
    ArtifactEntry,
    Bundle,
    EngineRecord,
    Manifest,
    Status,
    hash_files,
    load_bundle,
)
from export.engines import EngineSpec, backend_version, engine_from_onnx
from export.images import ImageSet
from export.onnx import onnx_from_module
from export.runtimes import ORT_CPU, check_loads_onnx, runtime_called, runtime_version
from export.verify import thresholds_with_drop
from flora.artifact import check_replaceable, new_folder
from flora.errors import InputError, few
from flora.imagesets import ImageSetRecord
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
from flora.pipeline.precision import CALIBRATED, Judges, Workbench, open_judges, precisions_asked, write_precision
from flora.pipeline.proof import Exported, Proof, Protocol, onnx_entry, prove, recommend
from flora.provenance import device_facts, gpu_facts, now, versions
from flora.resume import SETTINGS, Job
from flora.training.data import TimmImages

MODEL_FOLDER = "model"


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export and how to prove it; `batches` are the smallest, usual and largest one.

    With `certifies` the images must be none that the model was made with; without, they are those it was chosen by,
    and their labels count only where they are the model's classes. `runtime` runs the ONNX files, here and in later
    verifications.

    For `precisions` other than FP32, ranges are measured on `calib_images` of `calib_data`, and every choice is made on
    `select_data`, by default every fourth calibration image. `compare` gives the dense model them as well. `require` is
    what share of the products they must compute in, such as "int8>=80%".
    """

    eval_data: str | None
    certifies: bool = True
    runtime: str = ORT_CPU
    asked: AskedLatency | None = None
    precisions: tuple[str, ...] = ()
    calib_data: str | None = None
    select_data: str | None = None
    calib_images: int = 128
    seed: int = 0
    compare: bool = False
    require: str | None = None
    targets: tuple[str, ...] = ("onnx",)
    reference: Path | None = None
    max_drop: float = 1.0
    opset: int = 20
    batches: tuple[int, int, int] = (1, 8, 64)
    compute_capabilities: tuple[str, ...] = ()
    repeats: int = 20
    threads: int | None = None
    command: tuple[str, ...] = ()

    def made_with(self, calibration: str, selection: str) -> "ExportRequest":
        """The same with these images for lower precisions, judged by the second where none are given to judge by."""
        request = replace(self, calib_data=calibration, select_data=selection)
        return request if self.eval_data else replace(request, eval_data=selection, certifies=False)

    def engine_specs(self) -> list[EngineSpec]:
        """The engines asked for; what cannot be built or run is refused, `BackendMissingError` without its package."""
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
        for precision in self.low_precisions:
            for spec in specs:
                spec.fit_for(precision)
        if lacking := [precision for precision in self.required if precision not in self.low_precisions]:
            raise InputError(f"{self.require} is required, and the precisions do not name {few(lacking)}.")
        return specs

    @property
    def required(self) -> Mapping[str, float]:
        """The least share of the products by precision."""
        return Requirement.parse(self.require).least if self.require else {}

    @property
    def low_precisions(self) -> tuple[str, ...]:
        """Those besides FP32, in which the model is always exported."""
        has_engines = any(target != "onnx" for target in self.targets)
        return precisions_asked(self.precisions, self.runtime, has_engines=has_engines)[1:]

    @property
    def protocol(self) -> Protocol:
        smallest, usual, _ = self.batches
        return Protocol(
            smallest=smallest,
            usual=usual,
            repeats=self.repeats,
            threads=self.threads,
            thresholds=thresholds_with_drop(self.max_drop),
        )

    def judges(self, source: LoadedModel) -> Judges | None:
        """The images that lower precisions are made and chosen with; `InputError` where they are missing."""
        if not self.low_precisions:
            return None
        if self.calib_data is None:
            raise InputError(
                f"{', '.join(self.low_precisions)}: lower precisions are calibrated and chosen on images; name some, "
                "which need no labels and must not be the evaluation images, with --calib-data IMAGES."
            )
        return open_judges(
            self.calib_data,
            self.select_data,
            source.config.preprocessing,
            getattr(source.module, "num_classes", None),
            count=self.calib_images,
            seed=self.seed,
        )

    def workbench(self, judges: Judges, yardstick: Path, scratch: Path, on_step: Callable[[str], None]) -> Workbench:
        """What lower precisions are made with; the dense model's FP32 file lies at `yardstick`."""
        return Workbench(
            judges=judges,
            yardstick=yardstick,
            limits=self.protocol.thresholds,
            runtime=self.runtime,
            threads=self.threads,
            batch=self.batches[1],
            scratch=scratch,
            on_step=on_step,
        )

    def unmet(self, one: Exported) -> list[str]:
        """What is required of the file's precision and not so."""
        if one.precision not in self.required:
            return []
        if one.attestation is None:
            return [f"{self.require} is required, and {one.runtime} runs no files in {one.precision} to see it"]
        sentence = Requirement(least={one.precision: self.required[one.precision]}).unmet(one.attestation)
        return [sentence] if sentence else []


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
    judges = request.judges(source)
    options = {name: value for name, value in asdict(request).items() if name not in _NO_SETTINGS}
    job = Job(
        settings={
            "model": content_digest(source.folder),
            "reference": weights_digest(dense.module) if dense else None,
            "evaluation": identity(images, images.record()),
            "precision": {role: record.digest for role, record in judges.records.items()} if judges else None,
            **options,
        }
    )
    done = _is_there(job, out)
    on_start(done)
    if not done:
        export_bundle(source, request, out, job=job, on_step=on_step)


# Fields of a request that say where something lies, or how it was asked for.
_NO_SETTINGS = ("eval_data", "calib_data", "select_data", "reference", "command")


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
    judges = request.judges(source)
    seen = _joined(source.config.image_sets, judges)
    record = certified_record(images, seen if request.certifies else {})
    exported, not_pivoted = _to_export(source, dense, request.runtime)
    with new_folder(out, marker=MANIFEST) as folder, tempfile.TemporaryDirectory() as scratch:
        on_step("writing the compact model")
        save_model(folder / MODEL_FOLDER, source.module, source.config)
        for one in exported:
            on_step(f"exporting the {one.name} model to ONNX")
            _export_onnx(one, folder, request)
        low: list[Exported] = []
        lost: list[str] = []
        selected = None
        if judges is not None:
            bench = request.workbench(judges, folder / exported[0].path, Path(scratch), on_step)
            for one in _wanted(exported, request):
                try:
                    low.append(_lower(one, folder, bench))
                except InputError as error:
                    if one.precision in CALIBRATED:  # on images that are no good
                        raise
                    lost.append(f"{one.called} was not made: {error}")
            runnable = [*exported, *(one for one in low if one.runs_here)]
            selected = prove(runnable, folder, judges.selection, request.protocol, in_torch=False, on_step=on_step)
        engines = []
        for spec, one in itertools.product(specs, (exported[-1], *low)):
            if one.name == exported[-1].name:
                on_step(f"building the {spec.backend} engine of {one.called}")
                engines.append((spec.fit_for(one.precision), one))
                engine_from_onnx(folder / one.path, folder / _engine_path(spec, one), engines[-1][0])
        chosen = _chosen(exported, low, selected, request)
        proof = prove(
            [*exported, *chosen],
            folder,
            images,
            request.protocol,
            timed=[one for one in low if one.runs_here and one not in chosen],
            golden=folder / GOLDEN,
            on_step=on_step,
        )
        if job is not None:
            job.save(folder / SETTINGS)
        files = hash_files(folder)
        certified = [onnx_entry(one, folder, files, *_outcome(one, proof, request)) for one in (*exported, *chosen)]
        others = [
            onnx_entry(one, folder, files, *_outcome_of_loser(one, selected, request), certified=False)
            for one in low
            if one not in chosen
        ]
        by_path = {entry.path: entry for entry in (*certified, *others)}
        engine_entries = [engine_entry(spec, one, by_path[one.path], folder, files) for spec, one in engines]
        recommended, reason = recommend(
            _shippable(certified, exported, chosen, selected, request),
            proof.latency,
            factorized=bool(source.config.ranks),
        )
        notes = [*lost, *notes_on(source.config, dense, proof.report, record, seen, certifies=request.certifies)]
        if not_pivoted:
            notes.insert(0, note_on_pivots(not_pivoted))
        if request.asked is not None:
            name = exported[-1].onnx_name
            notes.insert(0, request.asked.outcome(proof.latency[name], name))
        manifest = Manifest(
            model=source.config.model,
            class_names=source.config.class_names and list(source.config.class_names),
            preprocessing=source.config.preprocessing,
            files=files,
            artifacts=[*certified, *others, *engine_entries],
            recommended=recommended,
            recommendation_reason=reason,
            max_drop=request.max_drop,
            unmet=[f"{one.onnx_name}: {line}" for one in low for line in request.unmet(one)],
            selection=selected.report if selected else None,
            verification=proof.report,
            latency=proof.latency,
            image_sets=({"evaluation": record} if request.certifies else {}) | seen,
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


def _joined(seen: Mapping[Any, ImageSetRecord], judges: Judges | None) -> dict[Any, ImageSetRecord]:
    """The images that the model was made with, and those that its precision was chosen with, by role."""
    joined = dict(seen)
    for role, record in judges.records.items() if judges else ():
        joined[role] = record.joined(joined.get(role))
    return joined


def _to_export(source: LoadedModel, dense: LoadedModel | None, runtime: str) -> tuple[list[Exported], list[str]]:
    """The files in FP32, the dense model's first, and the layers that should be pivoted and could not be."""
    module, not_pivoted = _pivoted(source)
    exported = [
        Exported(
            name="factorized" if source.config.ranks else "dense",
            runtime=runtime,
            role="candidate",
            model=source,
            path="onnx/model-fp32.onnx",
            module=module,
        )
    ]
    if dense is not None:
        yardstick = Exported(
            name="dense",
            runtime=runtime,
            role="yardstick",
            model=dense,
            path="onnx/dense-fp32.onnx",
            module=dense.module,
        )
        exported.insert(0, yardstick)
    return exported, not_pivoted


def _wanted(exported: Sequence[Exported], request: ExportRequest) -> Iterator[Exported]:
    """The files of lower precision to write: of the model, and of the dense one where that is asked for.

    On a GPU nobody would run the dense model in FP32: there its FP16 file is the yardstick.
    """
    on_gpu = runtime_called(request.runtime).on_gpu
    for one in exported:
        for precision in request.low_precisions:
            is_yardstick = one.role == "yardstick" and precision == "fp16" and on_gpu
            if one is exported[-1] or request.compare or is_yardstick:
                path = one.fp32_path.replace("fp32", precision)
                yield replace(one, precision=precision, role="yardstick" if is_yardstick else "candidate", path=path)


def _lower(one: Exported, folder: Path, bench: Workbench) -> Exported:
    """The file of lower precision, written and looked at."""
    path = folder / one.path
    record = write_precision(one.precision, folder / one.fp32_path, path, bench, one.name)
    attestation = None
    if one.runs_here:
        bench.on_step(f"looking at what computes {one.called}")
        attestation = attest(path, one.runtime, bench.judges.held_out(bench.batch), threads=bench.threads)
    return replace(one, quantization=record, attestation=attestation)


def _chosen(
    exported: Sequence[Exported], low: Sequence[Exported], selected: Proof | None, request: ExportRequest
) -> list[Exported]:
    """Of the files of lower precision the one to certify: the fastest that passed, where it is faster than FP32."""
    if selected is None:
        return []
    passed = [one for one in (*exported, *low) if _outcome(one, selected, request)[0] == "verified"]
    fastest = min(passed, key=lambda one: selected.latency[one.onnx_name].ratio, default=None)
    return [fastest] if fastest is not None and fastest.precision != "fp32" else []


def _shippable(
    certified: Sequence[ArtifactEntry],
    exported: Sequence[Exported],
    chosen: Sequence[Exported],
    selected: Proof | None,
    request: ExportRequest,
) -> list[ArtifactEntry]:
    """Of the certified files the yardstick and those that the selection images let pass, where there was a choice."""
    if selected is None:
        return list(certified)
    passed = {one.onnx_name for one in (*exported, *chosen) if _outcome(one, selected, request)[0] == "verified"}
    return [entry for entry in certified if entry.name in passed or entry.role == "yardstick"]


def _outcome(one: Exported, proof: Proof | None, request: ExportRequest) -> tuple[Status, str | None]:
    """Status of a file by what the images of `proof` showed, and why."""
    if not one.runs_here:
        return "built, not run", f"{one.runtime} runs no files in {one.precision}"
    assert proof is not None
    failures = [*request.unmet(one), *proof.failures(one)]
    return ("failed", "; ".join(failures)) if failures else ("verified", None)


def _outcome_of_loser(one: Exported, selected: Proof | None, request: ExportRequest) -> tuple[Status, str | None]:
    """The same of a file that was not chosen: it was run on the selection images alone."""
    status, reason = _outcome(one, selected, request)
    return status, reason or "it passed on the selection images and is slower here than what was chosen"


def engine_entry(
    spec: EngineSpec, one: Exported, entry: ArtifactEntry, folder: Path, files: dict[str, str]
) -> ArtifactEntry:
    """What the manifest keeps of an engine that was built from the file `one`, of which it keeps `entry`."""
    reason = "built for a device that is not here"
    if one.quantization and (one.quantization.high or one.quantization.weight_bits < 8):
        reason += f", from a file that was mixed and calibrated for {one.runtime} on this one"
    path = _engine_path(spec, one)
    return entry.model_copy(
        update={
            "name": f"{one.called}, {spec.backend}",
            "path": path,
            "kind": "engine",
            "runtime": ORT_CPU,
            "role": "candidate",
            "status": "built, not run",
            "reason": reason,
            "certified": False,
            "sha256": files[path],
            "size_bytes": (folder / path).stat().st_size,
            "spec": EngineRecord.of(spec),
            "attestation": None,
        }
    )


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


def _engine_path(spec: EngineSpec, one: Exported) -> str:
    return f"engines/model-{one.precision}-{spec.backend}.engine"


def _export_onnx(exported: Exported, folder: Path, request: ExportRequest) -> None:
    onnx_from_module(
        exported.module,
        folder / exported.path,
        preprocessing=exported.model.config.preprocessing,
        class_names=exported.model.config.class_names,
        opset=request.opset,
        max_batch=request.batches[2],
    )
