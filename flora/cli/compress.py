"""`flora compress`."""

import sys
from pathlib import Path
from typing import cast

import click
from click.core import ParameterSource

from flora.cli.options import (
    IMAGES_HELP,
    device_option,
    fitness_option,
    generations_option,
    json_option,
    max_drop_option,
    model_options,
    out_option,
    parse_model_kwargs,
    population_option,
    set_threads,
    split_names,
    targets_option,
    teacher_options,
    threads_option,
    torch_device,
    training_options,
    workers_option,
)
from flora.ranks.space import DEFAULT_SPACE


@click.command("compress")
@model_options
@click.option(
    "--method",
    type=click.Choice(["training-free", "supernet"]),
    default="training-free",
    show_default=True,
    help="training-free: probe every layer and allocate ranks. supernet: filter, train and search, as the paper does.",
)
@click.option(
    "--budget",
    required=True,
    metavar="BUDGET",
    help="macs=45% of the dense model, macs=2.7G or params=12M; training-free also latency=0.6x or latency=12ms, and "
    "drop=0.5: the fastest ranks that lose at most half a point on the selection images, before the factors are fitted "
    "again; at batch 8 or, with @b1, at another.",
)
@click.option(
    "--calib-data",
    metavar="IMAGES",
    help=f"Calibration images, labels not needed (supernet: by default 512 of the training images): {IMAGES_HELP}.",
)
@click.option(
    "--select-data",
    metavar="IMAGES",
    help="Images to choose by. training-free: labels not needed, by default every fourth calibration image. supernet: "
    "by default every tenth training image; filter takes 2000, search 5000.",
)
@click.option(
    "--latency-table",
    type=click.Path(path_type=Path),
    help="Table of flora latency-table for a budget of latency or drop; without one it is measured.",
)
@click.option("--data", metavar="IMAGES", help="Training images, for --method supernet.")
@click.option(
    "--eval-data", metavar="IMAGES", required=True, help="Images that nothing else has seen, read once at the end."
)
@out_option("bundle")
@targets_option
@click.option(
    "--layers", callback=split_names, default="qkv,proj,fc1,fc2", show_default=True, help="Linear layers to factorize."
)
@click.option(
    "--space",
    metavar="SPACE",
    help="As in flora build (default: multiples=8, for a budget of latency or drop multiples=16; for a supernet, "
    f"{DEFAULT_SPACE}).",
)
@click.option("--share", type=float, default=0.3, show_default=True, help="Part of each cost bin that filtering keeps.")
@fitness_option
@population_option
@generations_option
@teacher_options
@training_options("default")
@click.option(
    "--finetune-epochs",
    type=click.IntRange(min=0),
    help="Epochs for which the subnet that was found trains on by itself (default: as many as the supernet).",
)
@max_drop_option(1.0, "1.0")
@workers_option
@device_option
@threads_option
@click.option(
    "--restart",
    is_flag=True,
    help="Throw away what an unfinished step has left. Finished steps stay where they fit (to do all again, remove "
    "OUT.work).",
)
@json_option
@click.pass_context
def command(
    context: click.Context,
    /,
    model: str,
    checkpoint: Path | None,
    pretrained: bool,
    model_kwargs: tuple[str, ...],
    method: str,
    budget: str,
    calib_data: str | None,
    select_data: str | None,
    latency_table: Path | None,
    data: str | None,
    eval_data: str,
    out: Path,
    targets: tuple[str, ...],
    layers: tuple[str, ...],
    space: str | None,
    share: float,
    fitness: str,
    population: int,
    generations: int,
    teacher: str,
    teacher_checkpoint: Path | None,
    finetune_epochs: int | None,
    max_drop: float,
    workers: int,
    device: str,
    threads: int | None,
    restart: bool,
    as_json: bool,
    **training,
) -> None:
    """Compress a trained MODEL to a budget, and ship it with proof.

    By default without training, in minutes: factorizes the model, probes what each layer's rank costs, allocates ranks
    within the budget, fits the factors again to what their layers receive in the compact model, exports and verifies.
    With --method supernet it filters the candidates of a supernet, trains it, searches it, and fine-tunes what was
    found. What the steps make stays in OUT.work. Stopped, the same command goes on; with other options or other images,
    the steps that depend on them are done again; finished, it does nothing. Exit code 3 when a gate fails.
    """
    set_threads(threads)
    is_supernet = method == "supernet"
    _reject_options(context, is_supernet)
    from flora.cli.output import StepProgress
    from flora.cli.verification import print_bundle
    from flora.lowrank.checkpoint import load_model
    from flora.pipeline.export import ExportRequest
    from flora.training.processes import is_main, processes

    where = torch_device(device)
    processes(where)
    export = ExportRequest(
        eval_data=eval_data, targets=targets, max_drop=max_drop, threads=threads, command=("flora", *sys.argv[1:])
    )
    loaded = load_model(model, args=parse_model_kwargs(model_kwargs), checkpoint=checkpoint, pretrained=pretrained)

    def say_when_there(done: bool) -> None:
        if done and is_main() and not as_json:
            click.echo(f"flora: {out} is finished; there is nothing to do. Remove it to measure again.", err=True)

    with StepProgress(hidden=as_json or not is_main()) as shown:
        if is_supernet:
            from flora.cli.training import settings_from_options
            from flora.pipeline.compress import CompressRequest, compress
            from flora.ranks.evolution import SearchSettings

            settings = settings_from_options(training)
            request = CompressRequest(
                data=cast(str, data),
                budget=budget,
                export=export,
                settings=settings,
                finetune_epochs=settings.epochs if finetune_epochs is None else finetune_epochs,
                calib_data=calib_data,
                select_data=select_data,
                layers=layers,
                space=space or DEFAULT_SPACE,
                share=share,
                fitness=fitness,  # type: ignore[arg-type]
                search=SearchSettings.of_size(population, generations, seed=training["seed"] or 0),
                teacher=teacher,
                teacher_checkpoint=teacher_checkpoint,
                device=where,
                workers=workers,
                restart=restart,
            )
            bundle = compress(
                *(loaded, out, request), on_start=say_when_there, on_step=shown.on_step, on_line=shown.on_line
            )
        else:
            from flora.pipeline.training_free import TrainingFreeRequest, compress_training_free

            bundle = compress_training_free(
                loaded,
                out,
                TrainingFreeRequest(
                    calib_data=cast(str, calib_data),
                    budget=budget,
                    export=export,
                    select_data=select_data,
                    latency_table=latency_table,
                    layers=layers,
                    space=space,
                    device=where,
                    workers=workers,
                    restart=restart,
                ),
                on_start=say_when_there,
                on_step=shown.on_step,
            )
    if not is_main():
        return
    print_bundle(
        bundle,
        f"the bundle {out} (its steps lie in {out}.work)",
        f"flora verify {out} --data {eval_data}",
        as_json=as_json,
    )


def _reject_options(context: click.Context, is_supernet: bool) -> None:
    """Usage errors for images that are missing, and for options of the other method."""
    if is_supernet and context.params["data"] is None:
        raise click.UsageError("--method supernet trains, so it needs --data IMAGES.")
    if not is_supernet and context.params["calib_data"] is None:
        raise click.UsageError(
            "Without training, --calib-data IMAGES is needed; to train, give --method supernet --data IMAGES."
        )
    if is_supernet and context.params["latency_table"] is not None:
        raise click.UsageError("--latency-table belongs to --method training-free.")
    for option in () if is_supernet else context.command.params:
        given = context.get_parameter_source(option.name or "") is not ParameterSource.DEFAULT
        if given and option.name not in _BOTH:
            raise click.UsageError(f"{option.opts[0]} belongs to --method supernet.")


# Options of either method.
_BOTH = {
    *("model", "checkpoint", "pretrained", "model_kwargs", "method", "budget", "calib_data", "select_data"),
    *("eval_data", "out", "targets", "layers", "space", "max_drop", "workers", "device", "threads", "restart"),
    *("as_json", "latency_table"),
}
