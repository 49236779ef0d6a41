"""`flora verify`."""

from pathlib import Path

import click

from flora.cli.options import IMAGES_HELP, json_option, max_drop_option, threads_option


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", metavar="IMAGES", help=f"Labelled images to measure accuracy on: {IMAGES_HELP}.")
@max_drop_option(None, "that of the export")
@click.option("--runtime", metavar="RUNTIME", help="Run on ort-cpu, ort-cuda, ort-tensorrt or openvino instead.")
@click.option(
    "--trust-engines", is_flag=True, help="Run version-compatible engines too, which bring code of their own."
)
@threads_option
@json_option
def command(
    bundle: Path,
    data: str | None,
    max_drop: float | None,
    runtime: str | None,
    trust_engines: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Check BUNDLE here: the hash of every file, the golden outputs, and with --data the accuracy.

    Runs the ONNX files on the runtime that they were exported for, and each engine whose GPU is here; needs no torch.
    Exit code 3 when anything is not as it was exported.
    """
    if max_drop is not None and not data:
        raise click.UsageError("--max-drop judges accuracy, which needs --data IMAGES.")
    from flora.cli.output import print_json
    from flora.cli.verification import print_stages, print_verdict
    from flora.errors import GateFailedError
    from flora.pipeline.verify import verify_bundle

    check = verify_bundle(
        bundle, data=data, max_drop=max_drop, threads=threads, runtime=runtime, trusts_engines=trust_engines
    )
    manifest = check.bundle.manifest
    if as_json:
        print_json(
            {
                "bundle": str(bundle),
                "passed": check.passed,
                "problems": check.problems,
                "not_run": check.not_run,
                "engines": check.engines,
                "report": check.report.model_dump() if check.report else None,
            }
        )
    else:
        print(f"Hashes: {len(manifest.files)} files as exported.")
        print("\n".join(check.problems) or "Golden outputs: reproduced by every ONNX file.")
        if check.report:
            print_stages(check.report)
        for name, status in check.engines.items():
            print(f"Ran here: {name}: {status}.")
        for line in check.not_run:
            print(f"Not run here: {line}.")
        print_verdict(manifest)
    if not check.passed:
        stage = check.report.first_failure if check.report else None
        failed = stage or check.problems[0].partition(":")[0]
        raise GateFailedError(f"The gate failed at {failed}: {bundle} does not hold here.")
