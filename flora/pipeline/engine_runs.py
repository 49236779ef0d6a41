"""Engines of a bundle where they can run: opened, held against their ONNX files, and told why where they cannot.

Needs no torch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from export.bundle import ArtifactEntry, Bundle, Status
from export.padded import PaddedRunner
from export.runners import Runner
from export.tensorrt_runner import TensorRtRunner
from export.verify import Stage, VerifyReport


def why_not_run(entry: ArtifactEntry, folder: Path, *, trusted: bool) -> str | None:
    """Why an artefact that is no certified ONNX file is not run; nothing for an engine that can run here."""
    if entry.spec is None or entry.status == "failed":
        return entry.status
    reason = entry.spec.why_not_here(folder)
    if reason is None and entry.spec.version_compatible and not trusted:
        reason = "for other versions it brings code of its own; give --trust-engines if you know where it is from"
    return None if reason is None else f"{entry.status}; {reason}"


def open_engine(bundle: Bundle, entry: ArtifactEntry) -> Runner:
    """A runner of an engine that `why_not_run` has nothing against; `FloraError` where it does not load."""
    assert entry.spec is not None
    return TensorRtRunner(
        bundle.path_of(entry), name=entry.name, backend=entry.spec.backend, trusted=entry.spec.version_compatible
    )


def for_any_number(entry: ArtifactEntry, runner: Runner) -> Runner:
    """The same for any number of images: an engine takes those of its profiles."""
    return runner if entry.spec is None else PaddedRunner(runner, entry.spec.opt_batch)


def engine_stages(
    engines: Sequence[ArtifactEntry], runners: Mapping[str, Runner], first: str, fp32: Mapping[str, str]
) -> list[Stage]:
    """Each engine at the usual batch of every profile against its model's FP32 file, at its smallest against `first`.

    `fp32` has the stage of each ONNX file by path.
    """
    stages = []
    for entry in engines:
        assert entry.spec is not None
        smallest = min(profile[0] for profile in entry.spec.profiles)
        usual = dict.fromkeys(profile[1] for profile in entry.spec.profiles)  # kernels are chosen for each profile
        for name, batch, kind, before in (
            *((f"{entry.name}, batch {one}", one, entry.precision, fp32[entry.fp32_source]) for one in usual),
            (f"{entry.name}, batch {smallest}, against the first", smallest, "lowrank", first),
        ):
            runner = PaddedRunner(runners[entry.name], batch)
            stages.append(Stage(name=name, runner=runner, batch_size=batch, kind=kind, compared_with=before))
    return stages


def status_of(engine: ArtifactEntry, problems: Sequence[str], report: VerifyReport | None) -> Status:
    """What came of an engine that was to run here."""
    failed = any(problem.startswith(f"{engine.name}: ") for problem in problems)
    stages = [stage for stage in report.stages if stage.name.startswith(f"{engine.name}, batch ")] if report else []
    return "failed" if failed or not all(stage.passed for stage in stages) else "verified"
