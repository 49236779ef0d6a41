"""`flora export`."""

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from flora.cli.options import (
    IMAGES_HELP,
    batches_of,
    default_timing_cache,
    engine_options,
    expect_option,
    json_option,
    max_drop_option,
    pictures_option,
    precision_options,
    runtime_option,
    seed_option,
    set_threads,
    split_names,
    targets_option,
    threads_option,
    threshold_option,
)
from flora.errors import GateFailedError

# What says how engines are built, and is for --rebuild-engine too.
BUILD = ("more_profiles", "workspace_mib", "builder_level", "hardware_compatible", "version_compatible")
REBUILD = ("model", "rebuild_engine", "batches", "compute_capabilities", *BUILD, "timing_cache", "as_json")


@click.command("export")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--ranks", type=click.Path(path_type=Path), help="Cut MODEL, a supernet folder, at this rank config.")
@targets_option
@click.option(
    "--eval-data",
    metavar="IMAGES",
    help=f"Images that every step is verified on; needed, as -o is, but for --rebuild-engine: {IMAGES_HELP}.",
)
@runtime_option("What runs the ONNX files: ort-cpu, ort-cuda or ort-tensorrt (ONNX Runtime), or openvino.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write the bundle to.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="The dense model to verify against (a weights file or folder) instead of the one that MODEL records.",
)
@max_drop_option(None, "1, and 0.5 from FP32 to FP16 or BF16")
@threshold_option
@expect_option
@pictures_option
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
    callback=batches_of,
    default="1,8,64",
    show_default=True,
    metavar="MIN,OPT,MAX",
    help="Batch sizes: verification runs at MIN and OPT, latency at OPT, engines are built for the range.",
)
@engine_options
@click.option(
    "--compute-capabilities",
    callback=split_names,
    help="GPUs that a TensorRT-RTX engine is built for, e.g. sm86,sm89 (default: sm80, sm86, sm89 and sm120).",
)
@click.option(
    "--rebuild-engine",
    is_flag=True,
    help="Build the engines of the bundle MODEL anew, here and as they were, or as --batch and the options of engines "
    "say. Nothing else in it changes.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=20, show_default=True, help="Latency measurements.")
@threads_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    model: Path,
    ranks: Path | None,
    targets: tuple[str, ...],
    eval_data: str | None,
    runtime: str,
    out: Path | None,
    reference: Path | None,
    max_drop: float | None,
    thresholds: tuple[str, ...],
    expect_top1: float | None,
    pictures: bool,
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
    rebuild_engine: bool,
    timing_cache: Path | None,
    repeats: int,
    threads: int | None,
    as_json: bool,
    **build: Any,
) -> None:
    """Turn MODEL into a bundle: ONNX files, engines, and the proof that each is right.

    MODEL is a compact model folder, or a supernet folder with --ranks. The same images run through the dense model, the
    factorized one and the exported files; the fastest file that passes is recommended. Exit code 3 when a gate fails:
    the bundle is kept, with what failed labelled so.

    With --rebuild-engine, MODEL is a bundle, and its engines are built anew where they are to run.
    """
    if rebuild_engine:
        _rebuild(context, as_json=as_json)
        return
    if timing_cache is not None and "tensorrt" not in targets:
        raise click.UsageError("--timing-cache is for engines of TensorRT; name it with --to tensorrt.")
    if eval_data is None or out is None:
        raise click.UsageError("Missing option '--eval-data' or '--out': an export is verified on images, and written.")
    if not precisions and (calib_data or select_data or compare):
        raise click.UsageError(
            "--calib-data, --select-data and --compare serve lower precisions; name some with --precision."
        )
    set_threads(threads)
    from export.engine_spec import BuildOptions
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
        pictures=pictures,
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
        build=BuildOptions(**build),
        timing_cache=timing_cache or default_timing_cache(),
        repeats=repeats,
        threads=threads,
        command=("flora", *sys.argv[1:]),
    )
    source = load_exportable(model, ranks)
    with StepProgress(hidden=as_json) as shown:
        bundle = export_bundle(source, request, out, on_step=shown.on_step)
    print_bundle(bundle, f"the bundle {out}", f"flora verify {out} --data {eval_data}", as_json=as_json)


def _rebuild(context: click.Context, *, as_json: bool) -> None:
    """What --rebuild-engine does; options that change nothing of engines are refused."""
    given = [
        parameter
        for parameter in context.command.params
        if context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]
    if foreign := [parameter.opts[0] for parameter in given if parameter.name not in REBUILD]:
        raise click.UsageError(
            f"--rebuild-engine builds the engines of a bundle alone; leave out {', '.join(foreign)}."
        )
    from export.engine_spec import BuildOptions
    from flora.cli.output import StepProgress, print_json, print_next
    from flora.cli.verification import print_engines
    from flora.pipeline.rebuild import RebuildRequest, rebuild_engines

    values = context.params
    folder = values["model"]
    request = RebuildRequest(
        batches=values["batches"] if any(parameter.name == "batches" for parameter in given) else None,
        compute_capabilities=values["compute_capabilities"],
        build=BuildOptions(**{name: values[name] for name in BUILD}),
        timing_cache=values["timing_cache"] or default_timing_cache(),
        command=("flora", *sys.argv[1:]),
    )
    with StepProgress(hidden=as_json) as shown:
        bundle = rebuild_engines(folder, request, on_step=shown.on_step)
    engines = [entry for entry in bundle.manifest.artifacts if entry.kind == "engine"]
    if as_json:
        print_json({"bundle": str(folder), "engines": [entry.model_dump(mode="json") for entry in engines]})
    else:
        print_engines(bundle.manifest)
        print_next(f"the engines of {folder}", f"flora verify {folder}")
    if failed := [f"{entry.name}: {entry.reason}" for entry in engines if entry.status == "failed"]:
        raise GateFailedError(f"{'; '.join(failed)}. The engines are kept and labelled.")
