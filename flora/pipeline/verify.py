"""Checking a bundle, on the machine that made it or on another: files, golden outputs, accuracy. Needs no torch."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from export.bundle import ArtifactEntry, Bundle, Manifest, Status, check_golden, check_hashes, load_bundle
from export.runners import Runner
from export.runtimes import open_runner
from export.verify import Stage, VerifyReport, thresholds_with_drop, verify
from flora.errors import FloraError, GateFailedError
from flora.pipeline.engine_runs import engine_stages, for_any_number, open_engine, status_of, why_not_run
from flora.pipeline.images import certified_images

BATCHES = (1, 8)
# By so many, top-1 on other images of the same kind may differ.
STANDARD_ERRORS = 4


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
    threads: int | None = None,
    runtime: str | None = None,
    trusts_engines: bool = False,
) -> BundleCheck:
    """Check the hashes of all files, then run every ONNX file on the golden images, and on `data` if given.

    So is every engine whose GPU is here, which must give what its ONNX file does; for the others it is said why not.
    Only one who `trusts_engines` has those run that bring code of their own.
    `max_drop` (points of top-1) takes the place of the one in the manifest, `runtime` that of the one exported for.
    A file whose hash is wrong ends the check with a `GateFailedError`: it is not run.
    """
    bundle = load_bundle(folder)
    manifest = bundle.manifest
    if problems := check_hashes(bundle):
        built = tuple(entry.path for entry in manifest.artifacts if entry.kind == "engine")
        concern_engines = bool(built) and all(line.startswith(built) for line in problems)
        advice = f" Build it anew: flora export {folder} --rebuild-engine" if concern_engines else ""
        raise GateFailedError(
            f"{folder} is not what was exported: {'; '.join(problems)}. Nothing of it was run.{advice}"
        )
    images = None
    if data:
        classes = len(manifest.class_names) if manifest.class_names else None
        seen = {role: record for role, record in manifest.image_sets.items() if role != "evaluation"}
        images = certified_images(data, manifest.preprocessing, classes, seen)
    runnable = [entry for entry in manifest.artifacts if entry.kind == "onnx" and entry.certified]
    others = {
        entry.name: why_not_run(entry, folder, trusted=trusts_engines)
        for entry in manifest.artifacts
        if entry not in runnable
    }
    engines = [entry for entry in manifest.artifacts if others.get(entry.name, "") is None]
    problems = []
    with ExitStack() as opened:
        runners = {
            entry.name: opened.enter_context(
                open_runner(runtime or entry.runtime, bundle.path_of(entry), threads=threads, name=entry.name)
            )
            for entry in runnable
        }
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
            drop = manifest.max_drop if max_drop is None else max_drop
            stages = _stages(runnable, runners)
            fp32 = {entry.path: f"{entry.name}, batch {BATCHES[-1]}" for entry in runnable}
            stages += engine_stages([entry for entry in opened_ones if entry in engines], runners, stages[0].name, fp32)
            report = verify(stages, images, thresholds=thresholds_with_drop(drop))
            problems += _problem_of_images(manifest, report, drop)
    return BundleCheck(
        bundle=bundle,
        problems=problems,
        not_run=[f"{name}: {reason}" for name, reason in others.items() if reason is not None],
        engines={entry.name: status_of(entry, problems, report) for entry in engines},
        report=report,
    )


def _problem_of_images(manifest: Manifest, report: VerifyReport, drop: float) -> list[str]:
    """A line where the first model is much less often right than at export: then it is the images that differ.

    All stages see the same arrays, so that a wrong normalization or order of channels makes none depart from another.
    """
    now = report.stages[0]
    name = now.name.rpartition(", batch ")[0]
    certified = "evaluation" in manifest.image_sets  # figures of selection images flatter
    stages = manifest.verification.stages if manifest.verification and certified else []
    before = next((stage for stage in stages if stage.name.rpartition(", batch ")[0] == name), None)
    if before is None or before.top1 is None or now.top1 is None:
        return []
    error = math.hypot(before.top1_standard_error or 0.0, now.top1_standard_error or 0.0)
    if before.top1 - now.top1 <= drop + STANDARD_ERRORS * error:
        return []
    return [
        f"images: {name} is right on {now.top1:.2f} % of these and was on {before.top1:.2f} % at export. Look at how "
        "they are preprocessed (normalization, order of channels), at their labels, and whether they are of the same "
        "kind"
    ]


def _stages(entries: list[ArtifactEntry], runners: dict[str, Runner]) -> list[Stage]:
    """The yardstick first; every candidate against it at one batch, and against itself at another."""
    stages: list[Stage] = []
    for entry in sorted(entries, key=lambda entry: entry.role != "yardstick"):
        before = stages[0].name if stages else None
        for batch, kind in zip(BATCHES, ("lowrank", entry.precision), strict=True):
            name = f"{entry.name}, batch {batch}"
            stages.append(
                Stage(name=name, runner=runners[entry.name], batch_size=batch, kind=kind, compared_with=before)
            )
            before = name
    return stages
