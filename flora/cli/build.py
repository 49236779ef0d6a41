"""`flora build`."""

from pathlib import Path

import click

from flora.cli.options import (
    IMAGES_HELP,
    batch_size_option,
    device_option,
    json_option,
    model_options,
    out_option,
    parse_model_kwargs,
    restart_option,
    set_threads,
    space_options,
    split_names,
    threads_option,
    torch_device,
    workers_option,
)


@click.command("build")
@model_options
@click.option("--data", metavar="IMAGES", help=f"Calibration images, labels not needed: {IMAGES_HELP}.")
@out_option("supernet")
@click.option(
    "--layers",
    callback=split_names,
    default="qkv,fc1,fc2",
    show_default=True,
    help="Linear layers to factorize: last parts of names, or patterns such as 'blocks.*.attn.proj'.",
)
@click.option(
    "--method",
    type=click.Choice(["activation", "svd"]),
    default="activation",
    show_default=True,
    help="activation: least output error on the images; svd: of the weights alone, needs no images.",
)
@space_options
@batch_size_option(64)
@workers_option
@device_option
@threads_option
@restart_option
@json_option
def command(
    model: str,
    checkpoint: Path | None,
    pretrained: bool,
    model_kwargs: tuple[str, ...],
    data: str | None,
    out: Path,
    layers: tuple[str, ...],
    method: str,
    space: str,
    keep_redundant: bool,
    batch_size: int,
    workers: int,
    device: str,
    threads: int | None,
    restart: bool,
    as_json: bool,
) -> None:
    """Factorize a trained MODEL into a supernet.

    MODEL is a timm name, with --checkpoint or --pretrained, or a model folder of flora. The supernet holds nested
    factors of the selected layers, from which every rank can be cut.
    """
    if method == "activation" and not data:
        raise click.UsageError("--method activation needs --data IMAGES (some hundred images); or use --method svd.")
    if method == "svd" and data:
        raise click.UsageError("--method svd looks at no images; leave --data out.")
    set_threads(threads)
    from flora.cli.output import millions, print_json, print_next, print_table, progress, say_when_done
    from flora.lowrank.checkpoint import load_model
    from flora.pipeline.build import build
    from flora.pipeline.notes import layers_with_few_tokens, note_on_few_tokens

    loaded = load_model(model, args=parse_model_kwargs(model_kwargs), checkpoint=checkpoint, pretrained=pretrained)
    loaded.module.to(torch_device(device))
    with progress("factorizing layers", None, hidden=as_json) as advance:
        supernet = build(
            loaded,
            out,
            data=data,
            layers=layers,
            method="svd" if method == "svd" else "activation",
            space=space,
            keep_redundant=keep_redundant,
            batch_size=batch_size,
            workers=workers,
            restart=restart,
            on_start=say_when_done(out),
            on_layer=lambda name: advance(1),
        )
    cost = supernet.config.cost
    calibration = supernet.config.image_sets.get("calibration")
    images = calibration.images if calibration else 0
    if calibration and (lacking := layers_with_few_tokens(cost, images)):
        click.echo(f"flora: {note_on_few_tokens(lacking)}", err=True)
    if as_json:
        print_json(
            {
                "supernet": str(out),
                "model": supernet.config.model,
                "layers": len(cost.layers),
                "dense_macs": cost.dense_macs,
                "dense_params": cost.dense_params,
                "smallest_macs": cost.smallest_macs,
                "calibration_images": images,
                "method": method,
            }
        )
        return
    print_table(
        ["supernet", "layers", "MACs, dense", "MACs at rank 1", "parameters, dense", "calibration images"],
        [
            [
                supernet.config.model,
                str(len(cost.layers)),
                millions(cost.dense_macs),
                millions(cost.smallest_macs),
                millions(cost.dense_params),
                str(images),
            ]
        ],
    )
    print_next(
        f"the supernet {out}",
        f"flora materialize {out} --uniform-macs 50% -o {out}-compact",
        f"flora filter {out} --select-data IMAGES -o {out}-filtered",
    )
