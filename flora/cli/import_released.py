"""`flora import`."""

import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import click

from flora.cli.options import json_option, parse_model_kwargs

Kind = Literal["checkpoint", "yaml", "pickle"]


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", metavar="NAME", help="The timm model that a checkpoint or yaml is for.")
@click.option(
    "--model-kwargs",
    "-K",
    multiple=True,
    metavar="KEY=VALUE",
    help="Argument of timm's create_model, e.g. -K num_classes=10 (repeatable).",
)
@click.option(
    "--svd-config", type=click.Path(path_type=Path), help="The yaml that a subnet's checkpoint must agree with."
)
@click.option(
    "--dense",
    type=click.Path(path_type=Path),
    metavar="WEIGHTS",
    help="Weights of the dense model that low rank is compared with (default: a supernet at full rank).",
)
@click.option("--supernet", type=click.Path(path_type=Path), help="The supernet folder that a search space is for.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write; for a yaml, ranks.json."
)
@json_option
def command(
    file: Path,
    model: str | None,
    model_kwargs: tuple[str, ...],
    svd_config: Path | None,
    dense: Path | None,
    supernet: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Turn a FILE that FLORA's authors released into files of flora.

    \b
    checkpoint of a supernet  -> supernet folder       (--model NAME)
    checkpoint of a subnet    -> compact model folder  (--model NAME)
    yaml with SVD_CONFIG      -> ranks.json            (--model NAME)
    pickled search space      -> new supernet folder   (--supernet DIR)

    A yaml ends in .yaml or .yml, a search space in .pickle or .pkl. Nothing in a file is run.
    """
    kind = _kind(file)
    given = {
        "--model": model is not None,
        "--model-kwargs": bool(model_kwargs),
        "--svd-config": svd_config is not None,
        "--dense": dense is not None,
        "--supernet": supernet is not None,
    }
    _check_options(file, kind, {name for name, is_given in given.items() if is_given})
    args = parse_model_kwargs(model_kwargs)
    if supernet is not None:
        if out.resolve() == supernet.resolve():
            raise click.UsageError("A supernet is never changed in place; give -o another folder than --supernet.")
        _import_space(file, supernet, out, as_json)
    elif model is not None and kind == "yaml":
        _import_ranks(file, out, model, args, as_json)
    elif model is not None:
        _import_checkpoint(file, out, model, args, svd_config, dense, as_json)


def _kind(file: Path) -> Kind:
    suffix = file.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return "yaml"
    return "pickle" if suffix in (".pickle", ".pkl") and not zipfile.is_zipfile(file) else "checkpoint"


def _check_options(file: Path, kind: Kind, given: Collection[str]) -> None:
    """A usage error unless `given` has what a file of this kind needs, and nothing that it does not take."""
    needed, taken = {
        "checkpoint": ("--model", {"--model-kwargs", "--svd-config", "--dense"}),
        "yaml": ("--model", {"--model-kwargs"}),
        "pickle": ("--supernet", set[str]()),
    }[kind]
    what = {"checkpoint": "a checkpoint", "yaml": "a rank config", "pickle": "a search space"}[kind]
    if wrong := [name for name in given if name != needed and name not in taken]:
        raise click.UsageError(f"{file} is taken for {what}; leave {', '.join(sorted(wrong))} out.")
    if needed not in given:
        value = "NAME, the timm model that it is for" if needed == "--model" else "DIR, the supernet that it is for"
        raise click.UsageError(f"{file} is taken for {what}; give {needed} {value}.")


def _import_checkpoint(
    file: Path, out: Path, model: str, args: dict, svd_config: Path | None, dense: Path | None, as_json: bool
) -> None:
    from flora.cli.output import millions, print_json, print_next, print_table
    from flora.lowrank.checkpoint import LoadedSupernet
    from flora.pipeline.import_released import import_checkpoint

    imported = import_checkpoint(file, out, model=model, args=args, svd_config=svd_config, dense=dense)
    if not isinstance(imported, LoadedSupernet):
        _report_compact(out, as_json)
        return
    cost = imported.config.cost
    if as_json:
        print_json(
            {
                "supernet": str(out),
                "model": model,
                "layers": len(cost.layers),
                "dense_macs": cost.dense_macs,
                "dense_params": cost.dense_params,
                "smallest_macs": cost.macs(imported.config.space.smallest()),
                "dense_weights": str(dense) if dense else "multiplied out at full rank",
            }
        )
        return
    print_table(
        ["supernet", "layers", "MACs, dense", "MACs, smallest", "parameters, dense"],
        [
            [
                model,
                str(len(cost.layers)),
                millions(cost.dense_macs),
                millions(cost.macs(imported.config.space.smallest())),
                millions(cost.dense_params),
            ]
        ],
    )
    if dense is None:
        print("The dense model is this supernet multiplied out at full rank; --dense WEIGHTS names another.")
    print_next(f"the supernet {out}", f"flora materialize {out} --uniform-macs 50% -o {out}-compact")


def _report_compact(out: Path, as_json: bool) -> None:
    from flora.cli.output import millions, print_json, print_next, print_table
    from flora.lowrank.checkpoint import MODEL_CONFIG, RANK_CONFIG, ModelConfig
    from flora.ranks.config import RankConfig

    ranks, config = RankConfig.load(out / RANK_CONFIG), ModelConfig.load(out / MODEL_CONFIG)
    cut = sum(rank != "dense" for rank in ranks.ranks.values())
    if as_json:
        print_json(
            {
                "model": str(out),
                "macs": ranks.macs,
                "params": ranks.params,
                "cut_layers": cut,
                "dense_layers": len(ranks.ranks) - cut,
            }
        )
        return
    print_table(
        ["compact model", "MACs", "parameters", "layers cut", "left dense"],
        [[config.model, millions(ranks.macs), millions(ranks.params), str(cut), str(len(ranks.ranks) - cut)]],
    )
    reference = "" if config.reference else " --reference DENSE"
    print_next(
        f"the compact model {out}", f"flora export {out} --to onnx --eval-data IMAGES{reference} -o {out}-bundle"
    )


def _import_ranks(file: Path, out: Path, model: str, args: dict, as_json: bool) -> None:
    from flora.cli.output import millions, print_json, print_next, print_table
    from flora.pipeline.import_released import import_ranks

    config, cost = import_ranks(file, out, model=model, args=args)
    if as_json:
        print_json({"ranks": str(out), "model": model, "macs": config.macs, "params": config.params})
        return
    print_table(
        ["ranks for", "layers", "MACs", "of dense", "parameters"],
        [
            [
                model,
                str(len(config.ranks)),
                millions(config.macs),
                f"{cost.macs(config.ranks) / cost.dense_macs:.1%}",
                millions(config.params),
            ]
        ],
    )
    print_next(f"the ranks {out}", f"flora materialize SUPERNET --ranks {out} -o {out.stem}-compact")


def _import_space(file: Path, supernet: Path, out: Path, as_json: bool) -> None:
    from flora.cli.output import print_json, print_next, print_table
    from flora.pipeline.import_released import import_space

    space = import_space(file, supernet, out).config.space
    sizes = [space.block_size(index) for index in range(len(space.blocks))]
    if as_json:
        print_json({"supernet": str(out), "block_candidates": sizes, "configs": space.size})
        return
    print_table(
        ["blocks", "candidates, fewest", "candidates, most", "configs"],
        [[str(len(sizes)), str(min(sizes)), str(max(sizes)), f"{space.size:.3g}"]],
    )
    print("Ranks that cost as much as a dense layer count as dense; the smallest and the largest candidate are kept.")
    print_next(f"the supernet {out}", f"flora materialize {out} --uniform-macs 50% -o {out}-compact")
