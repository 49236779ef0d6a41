"""Checking a bundle, on the machine that made it or on another: files, golden outputs, accuracy. Needs no torch."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from export.bundle import MANIFEST, ArtifactEntry, Bundle, Manifest, check_golden, check_unaltered, load_bundle
from export.runners import Runner
from export.runtimes import open_runner
from export.thresholds import thresholds_with
from export.verify import Stage, StageReport, VerifyReport, verify
from flora.pipeline.images import certified_images

BATCHES = (1, 8)


@dataclass(frozen=True, kw_only=True)
class BundleCheck:
    """What was found: `problems` by sentence, the artefacts that were not run, and figures on images if given."""

    bundle: Bundle
    problems: list[str]
    not_run: list[str]
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
    threads: int | None = None,
    runtime: str | None = None,
) -> BundleCheck:
    """Check the hashes of all files, then run every ONNX file on the golden images, and on `data` if given.

    `max_drop` (points of top-1) and `thresholds` (see `thresholds_with`) take the place of those in the manifest,
    `runtime` that of the one exported for.
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
    runnable = [entry for entry in manifest.artifacts if entry.kind == "onnx" and entry.certified]
    with ExitStack() as opened:
        runners = {
            entry.name: opened.enter_context(
                open_runner(runtime or entry.runtime, bundle.path_of(entry), threads=threads, name=entry.name)
            )
            for entry in runnable
        }
        problems = [problem for entry in runnable for problem in _misdescribed(manifest, runners[entry.name])]
        problems += [problem for entry in runnable for problem in check_golden(bundle, entry, runners[entry.name])]
        report = None
        if images is None:
            failed = [entry for entry in runnable if entry.status == "failed"]
            problems += [f"{entry.name} failed at export: {entry.reason}" for entry in failed]
        else:
            report = verify(_stages(manifest, runnable, runners), images, thresholds=limits)
    not_run = [f"{entry.name}: {entry.status}" for entry in manifest.artifacts if entry not in runnable]
    return BundleCheck(bundle=bundle, problems=problems, not_run=not_run, report=report)


def _misdescribed(manifest: Manifest, runner: Runner) -> list[str]:
    """A line for each thing that the manifest, which has no hash itself, says otherwise than a file that has one."""
    names = None if manifest.class_names is None else json.dumps(manifest.class_names)
    said = {"flora.preprocessing": manifest.preprocessing.model_dump_json(), "flora.class_names": names}
    return [
        f"{MANIFEST}: {key.removeprefix('flora.')} is {mine}, and {runner.name} was exported with {written}"
        for key, mine in said.items()
        if (written := runner.described.get(key)) not in (None, mine)
    ]


def _expected(manifest: Manifest, name: str) -> StageReport | None:
    """The stage at export of what ran under this name, where it was certified: figures of selection images flatter."""
    stages = manifest.verification.stages if manifest.verification and "evaluation" in manifest.image_sets else []
    return next((stage for stage in stages if stage.name.rpartition(", batch ")[0] == name), None)


def _stages(manifest: Manifest, entries: list[ArtifactEntry], runners: dict[str, Runner]) -> list[Stage]:
    """The yardstick first, against what it was at export; every candidate against it, and against itself."""
    stages: list[Stage] = []
    for entry in sorted(entries, key=lambda entry: entry.role != "yardstick"):
        expected = None if stages else _expected(manifest, entry.name)
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
                    expected_top1=expected.top1 if expected else None,
                    expected_error=(expected.top1_standard_error or 0.0) if expected else 0.0,
                )
            )
            before, expected = name, None
    return stages
