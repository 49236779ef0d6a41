"""`flora filter`."""

from pathlib import Path

import click

from flora.cli.options import (
    IMAGES_HELP,
    device_option,
    json_option,
    out_option,
    restart_option,
    set_threads,
    threads_option,
    torch_device,
    training_options,
    workers_option,
)


@click.command("filter")
@click.argument("supernet", type=click.Path(path_type=Path))
@click.option(
    "--select-data", metavar="IMAGES", required=True, help=f"Images that candidates are scored on: {IMAGES_HELP}."
)
@out_option("filtered supernet")
@click.option("--share", type=float, default=0.3, show_default=True, help="Part of each cost bin that stays.")
@click.option(
    "--scorer",
    type=click.Choice(["training-free", "local"]),
    default="training-free",
    show_default=True,
    help="local: train one supernet for each block first, as the paper does (with --data).",
)
@click.option("--data", metavar="IMAGES", help="Training images of the local scorer.")
@training_options("local")
@workers_option
@device_option
@threads_option
@restart_option
@json_option
def command(
    supernet: Path,
    select_data: str,
    out: Path,
    share: float,
    scorer: str,
    data: str | None,
    workers: int,
    device: str,
    threads: int | None,
    restart: bool,
    as_json: bool,
    **training,
) -> None:
    """Keep the candidates of each block of SUPERNET that cost the model least, and write a new supernet.

    Every block is judged with the others at full rank: by how far the model's probabilities move from the dense
    model's. The best share of each cost bin stays, and always the smallest and the full ranks. Stopped, the same
    command goes on; finished, it does nothing. Under torchrun the blocks are spread over the processes.
    """
    if (scorer == "local") != (data is not None):
        raise click.UsageError("--scorer local trains, so it needs --data IMAGES; the training-free one takes none.")
    if scorer != "local" and any(value is not None for value in training.values()):
        raise click.UsageError("Training options belong to --scorer local.")
    set_threads(threads)
    from flora.cli.output import millions, print_json, print_next, print_table, progress, say_when_done
    from flora.cli.training import settings_from_options
    from flora.lowrank.checkpoint import load_supernet
    from flora.pipeline.filter import FilterRequest, filter_space
    from flora.ranks.filtering import reachable_macs
    from flora.training.processes import is_main, processes

    where = torch_device(device)
    processes(where)
    request = FilterRequest(
        select_data=select_data,
        share=share,
        scorer="local" if scorer == "local" else "training-free",
        data=data,
        settings=settings_from_options(training, preset="local") if scorer == "local" else None,
        device=where,
        workers=workers,
        restart=restart,
    )
    before = load_supernet(supernet).config
    with progress("scoring blocks", len(before.space.blocks), hidden=as_json or not is_main()) as advance:
        filtered, report = filter_space(
            *(supernet, out, request),
            on_start=say_when_done(out, hidden=not is_main()),
            on_block=lambda scores: advance(what=scores.block),
        )
    if not is_main():
        return
    ranges = [reachable_macs(config.space, config.cost) for config in (before, filtered.config)]
    forwards = sum(scores.image_forwards for scores in report.blocks)
    if as_json:
        print_json(
            {
                "supernet": str(out),
                "size_before": str(before.space.size),
                "size": str(filtered.config.space.size),
                "reachable_macs_before": ranges[0][:2],
                "reachable_macs": ranges[1][:2],
                "mean_macs_before": ranges[0][2],
                "mean_macs": ranges[1][2],
                "image_forwards": forwards,
            }
        )
        return
    print_table(
        ["block", "candidates", "run", "kept", "error of the smallest, nats"],
        [
            [
                scores.block,
                str(len(scores.candidates)),
                str(sum(agreement is not None for agreement in scores.agreements)),
                str(len(scores.kept)),
                f"{scores.errors[0]:.3g}",
            ]
            for scores in report.blocks
        ],
    )
    print_table(
        ["space", "configs", "smallest MACs", "largest MACs", "mean MACs"],
        [
            [name, f"{float(config.space.size):.3g}", *(millions(round(value)) for value in reach)]
            for name, config, reach in zip(("before", "after"), (before, filtered.config), ranges, strict=True)
        ],
    )
    print_next(f"the supernet {out}", f"flora train {out} --data IMAGES -o {out}-trained")
