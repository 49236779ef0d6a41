"""`flora materialize`."""

from pathlib import Path

import click

from flora.cli.options import json_option, out_option, threads_option


@click.command("materialize")
@click.argument("supernet", type=click.Path(path_type=Path))
@click.option("--ranks", type=click.Path(path_type=Path), help="A rank config (ranks.json).")
@click.option("--uniform", type=float, metavar="RATIO", help="The same share of every full rank, e.g. 0.5.")
@click.option(
    "--uniform-macs",
    metavar="BUDGET",
    help="The largest uniform ratio within a budget: 50% of the whole dense model's MACs, 2.7G, 800M.",
)
@out_option("compact model")
@threads_option
@json_option
def command(
    supernet: Path,
    ranks: Path | None,
    uniform: float | None,
    uniform_macs: str | None,
    out: Path,
    threads: int | None,
    as_json: bool,
) -> None:
    """Turn a SUPERNET folder and ranks into a compact model of plain linear layers.

    A layer whose rank is at or above its break-even rank stays one dense matrix. Layers that the file of ranks names
    under "pivoted" stay two, and are exported in pivoted form: the same product from fewer MACs. The compact model
    folder also gets the ranks as ranks.json.
    """
    if sum(choice is not None for choice in (ranks, uniform, uniform_macs)) != 1:
        raise click.UsageError("Give the ranks in one way: --ranks FILE, --uniform RATIO or --uniform-macs BUDGET.")
    from flora.artifact import check_replaceable
    from flora.cli.options import set_threads
    from flora.cli.output import millions, print_json, print_next, print_table
    from flora.lowrank.checkpoint import MODEL_CONFIG, load_supernet, save_model
    from flora.pipeline.compact import chosen_ranks, compact_from_supernet

    set_threads(threads)
    check_replaceable(out, marker=MODEL_CONFIG)
    loaded = load_supernet(supernet)
    config = chosen_ranks(loaded, file=ranks, ratio=uniform, macs=uniform_macs)
    compact = compact_from_supernet(loaded, config)
    save_model(out, compact.module, compact.config, ranks=config)
    cost = loaded.config.cost
    factored = sum(
        cost.shapes[name].is_factored(rank, pivoted=name in config.pivoted) for name, rank in config.ranks.items()
    )
    macs, params = cost.macs(config.ranks, config.pivoted), cost.params(config.ranks, config.pivoted)
    if as_json:
        print_json(
            {
                "model": str(out),
                "macs": macs,
                "macs_share": macs / cost.dense_macs,
                "params": params,
                "params_share": params / cost.dense_params,
                "factored_layers": factored,
                "dense_layers": len(config.ranks) - factored,
            }
        )
        return
    print_table(
        ["compact model", "MACs", "of dense", "parameters", "of dense", "layers factored", "left dense"],
        [
            [
                loaded.config.model,
                millions(macs),
                f"{macs / cost.dense_macs:.1%}",
                millions(params),
                f"{params / cost.dense_params:.1%}",
                str(factored),
                str(len(config.ranks) - factored),
            ]
        ],
    )
    print_next(f"the compact model {out}", f"flora export {out} --to onnx --eval-data IMAGES -o {out}-bundle")
