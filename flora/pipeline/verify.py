"""Checking a bundle, on the machine that made it or on another: files, golden outputs, accuracy. Needs no torch."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from export.bundle import MANIFEST, ArtifactEntry, Bundle, Manifest, Status, check_golden, check_unaltered, load_bundle
from export.runners import Runner
from export.runtimes import open_runner, runtime_called
from export.thresholds import thresholds_with
from export.verify import Stage, VerifyReport, verify
from flora.errors import FloraError, InputError
from flora.pipeline.engine_runs import engine_stages, for_any_number, open_engine, status_of, why_not_run
from flora.pipeline.images import certified_images

BATCHES = (1, 8)


@dataclass(frozen=True, kw_only=True)
class BundleCheck:
    """What was found: `problems` by sentence, the artefacts that were not run, and figures on images if given.

    `engines` has the status of each engine that ran here; the manifest keeps that of the export.
    """

    bundle: Bundle
    problems: list[str]
    not_run: list[str]
    engines: dict[str, Status]
    report: VerifyReport | None

    @property
    def passed(self) -> bool:
        return not self.problems and (self.report is None or self.report.passed)


def verify_bundle(
    folder: Path,
    *,
    data: str | None = None,
    max_drop: float | None = None,
    thresholds: Sequence[str] = (),
    expect_top1: float | None = None,
    threads: int | None = None,
    runtime: str | None = None,
    trusts_engines: bool = False,
) -> BundleCheck:
    """Check the hashes of all files, then run every ONNX file on the golden images, and on `data` if given.

    So is every engine whose GPU is here, which must give what its ONNX file does; for the others it is said why not.
    Only one who `trusts_engines` has those run that bring code of their own.
    `max_drop` (points of top-1) and `thresholds` (see `thresholds_with`) take the place of those in the manifest,
    `runtime` that of the one exported for, and `expect_top1`, in percent, that of what the dense model reached then.
    A file whose hash is wrong ends the check with a `GateFailedError`: it is not run.
    """
    bundle = load_bundle(folder)
    check_unaltered(bundle)
    manifest = bundle.manifest
    limits = thresholds_with(max_drop, thresholds, manifest.thresholds)
    images = None
    if data:
        classes = len(manifest.class_names) if manifest.class_names else None
        seen = {role: record for role, record in manifest.image_sets.items() if role != "evaluation"}
        images = certified_images(data, manifest.preprocessing, classes, seen)
    certified = [entry for entry in manifest.artifacts if entry.kind == "onnx" and entry.certified]
    runnable = [one for one in certified if one.precision in runtime_called(runtime or one.runtime).files]
    if not runnable:
        raise InputError(f"{runtime or 'Its runtime'} runs none of the ONNX files of {folder} that are to be shipped.")
    others = {
        entry.name: f"{runtime} runs no files in {entry.precision}"
        if entry in certified
        else why_not_run(entry, folder, trusted=trusts_engines)
        for entry in manifest.artifacts
        if entry not in runnable
    }
    engines = [entry for entry in manifest.artifacts if others.get(entry.name, "") is None]
    with ExitStack() as opened:
        runners = {
            entry.name: opened.enter_context(
                open_runner(runtime or entry.runtime, bundle.path_of(entry), threads=threads, name=entry.name)
            )
            for entry in runnable
        }
        problems = [problem for entry in runnable for problem in _misdescribed(manifest, runners[entry.name])]
        for entry in engines:
            try:
                runners[entry.name] = opened.enter_context(open_engine(bundle, entry))
            except FloraError as error:
                problems.append(f"{entry.name}: {error}")
        opened_ones = [entry for entry in (*runnable, *engines) if entry.name in runners]
        for entry in opened_ones:
            problems += check_golden(bundle, entry, for_any_number(entry, runners[entry.name]))
        report = None
        if images is None:
            failed = [entry for entry in runnable if entry.status == "failed"]
            problems += [f"{entry.name} failed at export: {entry.reason}" for entry in failed]
        else:
            stages = _stages(manifest, runnable, runners, expect_top1)
            fp32 = {entry.path: f"{entry.name}, batch {BATCHES[-1]}" for entry in runnable}
            stages += engine_stages([entry for entry in opened_ones if entry in engines], runners, stages[0].name, fp32)
            report = verify(stages, images, thresholds=limits)
    return BundleCheck(
        bundle=bundle,
        problems=problems,
        not_run=[f"{name}: {reason}" for name, reason in others.items() if reason is not None],
        engines={entry.name: status_of(entry, problems, report) for entry in engines},
        report=report,
    )


def _misdescribed(manifest: Manifest, runner: Runner) -> list[str]:
    """A line for each thing that the manifest, which has no hash itself, says otherwise than a file that has one."""
    names = None if manifest.class_names is None else json.dumps(manifest.class_names)
    said = {"flora.preprocessing": manifest.preprocessing.model_dump_json(), "flora.class_names": names}
    return [
        f"{MANIFEST}: {key.removeprefix('flora.')} is {mine}, and {runner.name} was exported with {written}"
        for key, mine in said.items()
        if (written := runner.described.get(key)) not in (None, mine)
    ]


def _expected(manifest: Manifest, name: str) -> tuple[float | None, float]:
    """Top-1 at export of what ran under this name, and its error, where it was certified: selection images flatter."""
    stages = manifest.verification.stages if manifest.verification and "evaluation" in manifest.image_sets else []
    found = next((stage for stage in stages if stage.name.rpartition(", batch ")[0] == name), None)
    return (found.top1, found.top1_standard_error or 0.0) if found else (None, 0.0)


def _stages(
    manifest: Manifest, entries: list[ArtifactEntry], runners: dict[str, Runner], expect_top1: float | None
) -> list[Stage]:
    """The yardstick first, against what it was at export; every candidate against it, and against itself."""
    stages: list[Stage] = []
    for entry in sorted(entries, key=lambda entry: entry.role != "yardstick"):
        expected, error = (None, 0.0) if stages else _expected(manifest, entry.name)
        if expect_top1 is not None and not stages:
            expected, error = expect_top1, 0.0
        before = stages[0].name if stages else None
        for batch, kind in zip(BATCHES, ("lowrank", entry.precision), strict=True):
            name = f"{entry.name}, batch {batch}"
            stages.append(
                Stage(
                    name=name,
                    runner=runners[entry.name],
                    batch_size=batch,
                    kind=kind,
                    compared_with=before,
                    expected_top1=expected,
                    expected_error=error,
                )
            )
            before, expected = name, None
    return stages
