"""`flora compress`."""

import sys
from pathlib import Path

import click

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


@click.command("compress")
@model_options
@click.option(
    "--method",
    type=click.Choice(["supernet"]),
    required=True,
    help="supernet: filter, train and search a supernet, as the paper does.",
)
@click.option("--budget", required=True, metavar="BUDGET", help="macs=45% of the dense model, macs=2.7G or params=12M.")
@click.option("--data", metavar="IMAGES", required=True, help=f"Training images: {IMAGES_HELP}.")
@click.option(
    "--select-data",
    metavar="IMAGES",
    help="Images to choose by (default: every tenth training image); filter takes 2000, search 5000.",
)
@click.option("--calib-data", metavar="IMAGES", help="Calibration images (default: 512 of the training images).")
@click.option(
    "--eval-data", metavar="IMAGES", required=True, help="Images that nothing else has seen, read once at the end."
)
@out_option("bundle")
@targets_option
@click.option(
    "--layers", callback=split_names, default="qkv,proj,fc1,fc2", show_default=True, help="Linear layers to factorize."
)
@click.option("--space", default="eighths", show_default=True, metavar="SPACE", help="As in flora build.")
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
def command(
    model: str,
    checkpoint: Path | None,
    pretrained: bool,
    model_kwargs: tuple[str, ...],
    method: str,
    budget: str,
    data: str,
    select_data: str | None,
    calib_data: str | None,
    eval_data: str,
    out: Path,
    targets: tuple[str, ...],
    layers: tuple[str, ...],
    space: str,
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

    Builds a supernet, filters its candidates, trains it, searches it, materializes and fine-tunes what was found,
    exports and verifies. What the steps make stays in OUT.work. Stopped, the same command goes on; with other
    options or other images, the steps that depend on them are done again. Exit code 3 when a gate fails.
    """
    set_threads(threads)
    from flora.cli.output import status
    from flora.cli.training import settings_from_options
    from flora.cli.verification import print_bundle
    from flora.lowrank.checkpoint import load_model
    from flora.pipeline.compress import CompressRequest, compress
    from flora.pipeline.export import ExportRequest
    from flora.ranks.evolution import SearchSettings
    from flora.training.processes import is_main, processes

    where = torch_device(device)
    processes(where)
    settings = settings_from_options(training)
    request = CompressRequest(
        data=data,
        budget=budget,
        export=ExportRequest(
            eval_data=eval_data, targets=targets, max_drop=max_drop, threads=threads, command=("flora", *sys.argv[1:])
        ),
        settings=settings,
        finetune_epochs=settings.epochs if finetune_epochs is None else finetune_epochs,
        calib_data=calib_data,
        select_data=select_data,
        layers=layers,
        space=space,
        share=share,
        fitness=fitness,  # type: ignore[arg-type]
        search=SearchSettings.of_size(population, generations, seed=training["seed"] or 0),
        teacher=teacher,
        teacher_checkpoint=teacher_checkpoint,
        device=where,
        workers=workers,
        restart=restart,
    )
    loaded = load_model(model, args=parse_model_kwargs(model_kwargs), checkpoint=checkpoint, pretrained=pretrained)
    with status(hidden=as_json or not is_main()) as say:
        bundle = compress(loaded, out, request, on_step=say)
    if not is_main():
        return
    print_bundle(
        bundle,
        f"the bundle {out} (its steps lie in {out}.work)",
        f"flora verify {out} --data {eval_data}",
        as_json=as_json,
    )
