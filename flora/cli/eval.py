"""`flora eval`."""

from pathlib import Path

import click

from flora.cli.options import (
    IMAGES_HELP,
    batch_size_option,
    device_option,
    json_option,
    model_options,
    parse_model_kwargs,
    set_threads,
    threads_option,
    torch_device,
    workers_option,
)


@click.command("eval")
@model_options
@click.option("--data", metavar="IMAGES", required=True, help=f"Labelled images: {IMAGES_HELP}.")
@click.option("--ranks", type=click.Path(path_type=Path), help="Evaluate a supernet folder at this rank config.")
@click.option("--autocast", type=click.Choice(["bf16", "fp16"]), help="Run in reduced precision.")
@batch_size_option(128)
@workers_option
@device_option
@threads_option
@json_option
def command(
    model: str,
    checkpoint: Path | None,
    pretrained: bool,
    model_kwargs: tuple[str, ...],
    data: str,
    ranks: Path | None,
    autocast: str | None,
    batch_size: int,
    workers: int,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure top-1, top-5 and loss of MODEL on labelled images, with the model's own preprocessing.

    MODEL is a timm name, with --checkpoint or --pretrained, a dense or compact model folder, or a supernet folder
    (at full rank unless --ranks is given).
    """
    set_threads(threads)
    import torch

    from flora.cli.output import percent, print_json, print_table, progress
    from flora.errors import InputError
    from flora.lowrank.checkpoint import LoadedModel, LoadedSupernet, is_supernet_folder, load_model, load_supernet
    from flora.lowrank.supernet import set_ranks
    from flora.ranks.config import RankConfig
    from flora.training.data import TimmImages
    from flora.training.evaluate import evaluate

    loaded: LoadedModel | LoadedSupernet
    if is_supernet_folder(Path(model)):
        if checkpoint or pretrained or model_kwargs:
            raise InputError(
                f"{model} is a supernet folder: it brings its own arguments and weights; "
                "leave out --checkpoint, --pretrained and --model-kwargs."
            )
        loaded = load_supernet(Path(model))
        if ranks:
            rank_config = RankConfig.load(ranks)
            rank_config.check(model=loaded.config.model, shapes=loaded.config.cost.shapes)
            set_ranks(loaded.module, rank_config.ranks)
    elif ranks:
        raise InputError(f"--ranks chooses a subnet of a supernet folder; {model} is none.")
    else:
        loaded = load_model(model, args=parse_model_kwargs(model_kwargs), checkpoint=checkpoint, pretrained=pretrained)
    images = TimmImages(data, loaded.config.preprocessing, workers=workers)
    loaded.module.to(torch_device(device))
    with progress("evaluating", len(images), hidden=as_json) as advance:
        accuracy = evaluate(
            loaded.module,
            images.loader(batch_size),
            autocast={"bf16": torch.bfloat16, "fp16": torch.float16, None: None}[autocast],
            on_batch=advance,
        )
    if as_json:
        print_json({**accuracy.model_dump(), "top1_standard_error": accuracy.top1_standard_error})
        return
    print_table(
        ["model", "images", "top-1", "standard error", "top-5", "loss"],
        [
            [
                model,
                str(accuracy.images),
                percent(accuracy.top1),
                f"{accuracy.top1_standard_error:.2f}",
                percent(accuracy.top5),
                f"{accuracy.loss:.4f}",
            ]
        ],
    )
