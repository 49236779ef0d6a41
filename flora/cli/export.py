"""`flora export`."""

import sys
from pathlib import Path

import click

from flora.cli.options import (
    IMAGES_HELP,
    expect_option,
    json_option,
    max_drop_option,
    out_option,
    precision_options,
    runtime_option,
    seed_option,
    set_threads,
    split_names,
    targets_option,
    threads_option,
    threshold_option,
)


def _batches(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int, int]:
    try:
        smallest, usual, largest = (int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not MIN,OPT,MAX, such as 1,8,32.") from error
    if not 1 <= smallest <= usual <= largest:
        raise click.BadParameter(f"{value!r}: the batches must rise, 1 <= MIN <= OPT <= MAX.")
    return smallest, usual, largest


@click.command("export")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--ranks", type=click.Path(path_type=Path), help="Cut MODEL, a supernet folder, at this rank config.")
@targets_option
@click.option(
    "--eval-data", metavar="IMAGES", required=True, help=f"Images that every step is verified on: {IMAGES_HELP}."
)
@runtime_option("What runs the ONNX files: ort-cpu or ort-cuda (ONNX Runtime), or openvino.")
@out_option("bundle")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="The dense model to verify against (a weights file or folder) instead of the one that MODEL records.",
)
@max_drop_option(1.0, "1.0")
@threshold_option
@expect_option
@precision_options("--precision")
@click.option(
    "--calib-data",
    metavar="IMAGES",
    help="Images that lower precisions are calibrated on; labels are not needed. Never the evaluation images.",
)
@click.option(
    "--select-data",
    metavar="IMAGES",
    help="Images that precisions are chosen by (default: every fourth of --calib-data, held out).",
)
@seed_option("Which of --calib-data are taken.")
@click.option("--opset", type=int, default=20, show_default=True, help="ONNX opset, 17 to 25.")
@click.option(
    "--batch",
    "batches",
    callback=_batches,
    default="1,8,64",
    show_default=True,
    metavar="MIN,OPT,MAX",
    help="Batch sizes: verification runs at MIN and OPT, latency at OPT, engines are built for the range.",
)
@click.option(
    "--compute-capabilities",
    callback=split_names,
    help="GPUs that a TensorRT-RTX engine is built for, e.g. sm86,sm89 (default: sm80, sm86, sm89 and sm120).",
)
@click.option("--repeats", type=click.IntRange(min=1), default=20, show_default=True, help="Latency measurements.")
@threads_option
@json_option
def command(
    model: Path,
    ranks: Path | None,
    targets: tuple[str, ...],
    eval_data: str,
    runtime: str,
    out: Path,
    reference: Path | None,
    max_drop: float,
    thresholds: tuple[str, ...],
    expect_top1: float | None,
    precisions: tuple[str, ...],
    calib_data: str | None,
    select_data: str | None,
    calib_images: int,
    seed: int,
    compare: bool,
    require: str | None,
    opset: int,
    batches: tuple[int, int, int],
    compute_capabilities: tuple[str, ...],
    repeats: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Turn MODEL into a bundle: ONNX files, engines, and the proof that each is right.

    MODEL is a compact model folder, or a supernet folder with --ranks. The same images run through the dense model, the
    factorized one and the exported files; the fastest file that passes is recommended. Exit code 3 when a gate fails:
    the bundle is kept, with what failed labelled so.
    """
    if not precisions and (calib_data or select_data or compare):
        raise click.UsageError(
            "--calib-data, --select-data and --compare serve lower precisions; name some with --precision."
        )
    set_threads(threads)
    from flora.cli.output import StepProgress
    from flora.cli.verification import print_bundle
    from flora.pipeline.export import export_bundle, load_exportable
    from flora.pipeline.export_request import ExportRequest

    request = ExportRequest(
        targets=targets,
        eval_data=eval_data,
        runtime=runtime,
        reference=reference,
        max_drop=max_drop,
        thresholds=thresholds,
        expect_top1=expect_top1,
        precisions=precisions,
        calib_data=calib_data,
        select_data=select_data,
        calib_images=calib_images,
        seed=seed,
        compare=compare,
        require=require,
        opset=opset,
        batches=batches,
        compute_capabilities=compute_capabilities,
        repeats=repeats,
        threads=threads,
        command=("flora", *sys.argv[1:]),
    )
    source = load_exportable(model, ranks)
    with StepProgress(hidden=as_json) as shown:
        bundle = export_bundle(source, request, out, on_step=shown.on_step)
    print_bundle(bundle, f"the bundle {out}", f"flora verify {out} --data {eval_data}", as_json=as_json)
