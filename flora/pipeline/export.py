"""From a compact model to a verified bundle: export, precisions, engines, verification, recommendation, manifest."""

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from calibrate.half import BeyondRangeError
from export.attestation import attest
from export.bundle import (
    GOLDEN,
    MANIFEST,
    MODEL_FOLDER,
    ArtifactEntry,
    Bundle,
    Manifest,
    Status,
    hash_files,
    load_bundle,
)
from export.images import ChoosableImages
from export.onnx import onnx_from_module
from export.pictures import write_pictures
from export.report.page import add_report
from export.runtimes import ORT_CPU, runtime_called
from flora.artifact import check_replaceable, new_folder
from flora.errors import InputError
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
from flora.pipeline.engines import BuiltEngine, build_engine
from flora.pipeline.export_request import ExportRequest
from flora.pipeline.images import (
    Unlabelled,
    certified_record,
    check_classes,
    identity,
    labels_are_classes,
    open_images,
)
from flora.pipeline.job import OnStart
from flora.pipeline.notes import note_on_drift, note_on_pivots, notes_on
from flora.pipeline.parts import layer_entries, part_costs
from flora.pipeline.precision import CALIBRATED, OF_ENGINES, Judges, Workbench, write_precision
from flora.pipeline.proof import Exported, Proof, onnx_entry, prove, recommend
from flora.provenance import device_facts, gpu_facts, now, versions
from flora.resume import SETTINGS, Job
from flora.training.data import TimmImages


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


# Fields of a request that say where something lies, how it was asked for, or what the model and its images decide.
_NO_SETTINGS = ("eval_data", "calib_data", "select_data", "reference", "timing_cache", "command", "probes")


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
                    # What is calibrated fails on images that are no good, else on what it has no numbers for.
                    if one.precision in CALIBRATED and not isinstance(error, BeyondRangeError):
                        raise
                    (folder / one.path).unlink(missing_ok=True)
                    lost.append(f"{one.called} was not made: {error}")
            runnable = [*exported, *(one for one in low if one.runs_here)]
            selected = prove(runnable, folder, judges.selection, request.protocol, in_torch=False, on_step=on_step)
        engines = []
        for spec, one in itertools.product(specs, (exported[-1], *low)):
            if one.name == exported[-1].name and one.precision not in OF_ENGINES:
                on_step(f"building the {spec.backend} engine of {one.called}")
                engines.append(
                    build_engine(spec.fit_for(one.precision), one, folder, timing_cache=request.timing_cache)
                )
        chosen = _chosen(exported, low, selected, request)
        proof = prove(
            [*exported, *chosen],
            folder,
            images,
            request.protocol,
            timed=[one for one in low if one.runs_here and not one.is_for_engines and one not in chosen],
            golden=folder / GOLDEN,
            on_step=on_step,
        )
        report = proof.report
        if request.pictures and not getattr(images, "is_streamed", False):
            report = write_pictures(report, images, source.config.preprocessing, folder)
        on_step("looking at where time goes")
        parts = {one.onnx_name: part_costs(one, folder, request.protocol) for one in exported}
        if job is not None:
            job.save(folder / SETTINGS)
        files = hash_files(folder)
        certified = [
            onnx_entry(one, folder, files, *_outcome(one, proof, request), parts=parts.get(one.onnx_name, {}))
            for one in (*exported, *chosen)
        ]
        others = [
            onnx_entry(one, folder, files, *_outcome_of_loser(one, selected, request), parts={}, certified=False)
            for one in low
            if one not in chosen
        ]
        by_path = {entry.path: entry for entry in (*certified, *others)}
        engine_entries = [
            engine.entry(by_path[engine.source.path], folder, files, _unmet(engine, request)) for engine in engines
        ]
        recommended, reason = recommend(
            _shippable(certified, exported, chosen, selected, request),
            proof.latency,
            report.stages[0],
            factorized=bool(source.config.ranks),
        )
        notes = [*lost, *(judges.notes() if judges else ())]
        notes += notes_on(source.config, dense, proof.report, record, seen, certifies=request.certifies)
        if drift := note_on_drift(proof.latency):
            notes.append(drift)
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
            layers=layer_entries(source.config, dense, not_pivoted=not_pivoted, probes=request.probes),
            recommended=recommended,
            recommendation_reason=reason,
            thresholds=request.protocol.thresholds,
            require=request.require,
            unmet=[
                *(f"{one.onnx_name}: {line}" for one in low for line in _unmet(one, request)),
                *(f"{entry.name}: {entry.reason}" for entry in engine_entries if entry.status == "failed"),
                *request.unseen([*low, *engines]),
            ],
            selection=selected.report if selected else None,
            verification=report,
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
        add_report(manifest, folder).save(folder / MANIFEST)
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
            is_for_engines = precision in runtime_called(ORT_CPU).only_shown
            if one is exported[-1] or is_yardstick or (request.compare and not is_for_engines):
                yield replace(
                    one,
                    precision=precision,
                    runtime=ORT_CPU if is_for_engines else one.runtime,
                    role="yardstick" if is_yardstick else "candidate",
                    path=one.fp32_path.replace("fp32", precision),
                    fp32_name=one.onnx_name,
                )


def _lower(one: Exported, folder: Path, bench: Workbench) -> Exported:
    """The file of lower precision, written and looked at."""
    path = folder / one.path
    record = write_precision(one.precision, folder / one.fp32_path, path, bench, one.name)
    attestation = None
    if one.runs_here and not one.is_for_engines:
        bench.on_step(f"looking at what computes {one.called}")
        attestation = attest(path, one.runtime, bench.judges.held_out(bench.batch), threads=bench.threads)
    return replace(one, quantization=record, attestation=attestation)


def _chosen(
    exported: Sequence[Exported], low: Sequence[Exported], selected: Proof | None, request: ExportRequest
) -> list[Exported]:
    """Of the files of lower precision the one to certify: the fastest that passed, where it is faster than FP32."""
    if selected is None:
        return []
    rivals = [one for one in (*exported, *low) if not one.is_for_engines]
    passed = [one for one in rivals if _outcome(one, selected, request)[0] == "verified"]
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


def _unmet(one: Exported | BuiltEngine, request: ExportRequest) -> list[str]:
    """What is required of the precision of a file or engine and was seen not to be so."""
    return request.unmet(one.of_products, one.attestation)


def _outcome(one: Exported, proof: Proof | None, request: ExportRequest) -> tuple[Status, str | None]:
    """Status of a file by what the images of `proof` showed, and why."""
    if not one.runs_here:
        return "built, not run", f"{one.runtime} runs no files in {one.precision}"
    assert proof is not None
    failures = [*_unmet(one, request), *proof.failures(one)]
    return ("failed", "; ".join(failures)) if failures else ("verified", None)


def _outcome_of_loser(one: Exported, selected: Proof | None, request: ExportRequest) -> tuple[Status, str | None]:
    """The same of a file that was not chosen: it was run on the selection images alone."""
    status, reason = _outcome(one, selected, request)
    if one.is_for_engines:
        return status, reason or "it is for engines; it passed on the selection images, as it is written"
    return status, reason or "it passed on the selection images and is slower here than what was chosen"


def _images_to_judge_by(request: ExportRequest, source: LoadedModel) -> ChoosableImages:
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


def _export_onnx(exported: Exported, folder: Path, request: ExportRequest) -> None:
    onnx_from_module(
        exported.module,
        folder / exported.path,
        preprocessing=exported.model.config.preprocessing,
        class_names=exported.model.config.class_names,
        opset=request.opset,
        max_batch=request.batches[2],
    )
