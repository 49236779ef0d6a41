"""`flora verify`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flora.cli.options import IMAGES_HELP, expect_option, json_option, max_drop_option, threads_option, threshold_option

if TYPE_CHECKING:
    from flora.pipeline.bisect import BundleBisection
    from flora.pipeline.verify import BundleCheck


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", metavar="IMAGES", help=f"Labelled images to measure accuracy on: {IMAGES_HELP}.")
@max_drop_option(None, "that of the export")
@threshold_option
@expect_option
@click.option("--runtime", metavar="RUNTIME", help="Run on ort-cpu, ort-cuda, ort-tensorrt or openvino instead.")
@click.option(
    "--bisect",
    "with_bisection",
    is_flag=True,
    help="Also name the first layer of each file that departs from its FP32 file, on ONNX Runtime's CPU provider, by "
    "the golden images or 32 of --data; runs files that were altered as well.",
)
@click.option(
    "--trust-engines", is_flag=True, help="Run version-compatible engines too, which bring code of their own."
)
@threads_option
@json_option
def command(
    bundle: Path,
    data: str | None,
    max_drop: float | None,
    thresholds: tuple[str, ...],
    expect_top1: float | None,
    runtime: str | None,
    with_bisection: bool,
    trust_engines: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Check BUNDLE here: the hash of every file, the golden outputs, and with --data the accuracy.

    Runs the ONNX files on the runtime that they were exported for, and each engine whose GPU is here; needs no torch.
    Exit code 3 when anything is not as it was exported, or with --bisect when a layer departs.
    """
    if max_drop is not None and not data:
        raise click.UsageError("--max-drop judges accuracy, which needs --data IMAGES.")
    if expect_top1 is not None and not data:
        raise click.UsageError("--expect-top1 is what the dense model reaches on --data IMAGES; name them.")
    from flora.cli.output import print_json
    from flora.errors import GateFailedError
    from flora.pipeline.verify import verify_bundle

    found = _bisection(bundle, data, threads, hidden=as_json) if with_bisection else None
    altered = found.problems if found else []
    # Of a bundle that was altered, layers are compared and nothing else.
    check = None
    if not altered:
        check = verify_bundle(
            bundle,
            data=data,
            max_drop=max_drop,
            thresholds=thresholds,
            expect_top1=expect_top1,
            threads=threads,
            runtime=runtime,
            trusts_engines=trust_engines,
        )
    if as_json:
        said = {
            "bundle": str(bundle),
            "passed": check is not None and check.passed and (found is None or found.passed),
            "problems": check.problems if check else altered,
            "not_run": check.not_run if check else [],
            "engines": check.engines if check else {},
            "report": check.report.model_dump() if check and check.report else None,
        }
        print_json(said | ({"bisection": found.as_json()} if found else {}))
    else:
        _print(check, found)
    if altered:
        raise GateFailedError(
            f"{bundle} is not what was exported: {'; '.join(altered)}. Only its layers were compared."
        )
    if check and not check.passed:
        stage = check.report.first_failure if check.report else None
        failed = stage or check.problems[0].partition(":")[0]
        raise GateFailedError(f"The gate failed at {failed}: {bundle} does not hold here.")
    if found and not found.passed:
        raise GateFailedError(f"A layer departs in {', '.join(found.departing)}: {bundle} does not hold here.")


def _bisection(bundle: Path, data: str | None, threads: int | None, *, hidden: bool) -> "BundleBisection":
    from flora.cli.output import StepProgress
    from flora.pipeline.bisect import bisect_bundle

    with StepProgress(hidden=hidden) as shown:
        return bisect_bundle(bundle, data=data, threads=threads, on_step=shown.on_step)


def _print(check: "BundleCheck | None", found: "BundleBisection | None") -> None:
    from flora.cli.bisection import print_bisection
    from flora.cli.verification import print_stages, print_verdict

    if check:
        print(f"Hashes: {len(check.bundle.manifest.files)} files as exported.")
        print("\n".join(check.problems) or "Golden outputs: reproduced by every ONNX file.")
        if check.report:
            print_stages(check.report)
        for name, status in check.engines.items():
            print(f"Ran here: {name}: {status}.")
        for line in check.not_run:
            print(f"Not run here: {line}.")
    elif found:
        print("\n".join(f"{problem}." for problem in found.problems))
    if found:
        print_bisection(found)
    if check:
        print_verdict(check.bundle.manifest)
