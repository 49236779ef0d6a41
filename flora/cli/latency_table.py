"""`flora latency-table`."""

from pathlib import Path

import click

from flora.cli.options import (
    batches_option,
    json_option,
    model_kwargs_option,
    parse_model_kwargs,
    restart_option,
    runtime_option,
    set_threads,
    split_names,
)


@click.command("latency-table")
@model_kwargs_option
@click.argument("model")
@runtime_option("ort-cpu, ort-cuda or ort-tensorrt (ONNX Runtime), openvino, tensorrt, torch or torch-cuda.")
@batches_option("Batch sizes to measure at.")
@click.option(
    "--precision",
    "precisions",
    metavar="P,P,...",
    callback=split_names,
    default="fp32",
    show_default=True,
    help="What layers compute in: fp32; int8 on ONNX files and TensorRT; openvino and torch also bf16, torch-cuda "
    "also fp16.",
)
@click.option(
    "--layers", callback=split_names, default="qkv,proj,fc1,fc2", show_default=True, help="Linear layers to measure."
)
@click.option("--points", type=int, default=8, show_default=True, help="Ranks at which each shape is measured.")
@click.option(
    "--minutes", type=float, help="Begin no group of measurements after so many minutes; the same command goes on."
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of the runtime.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="JSON file to write the table to.")
@restart_option
@json_option
def command(
    model: str,
    model_kwargs: tuple[str, ...],
    runtime: str,
    batches: tuple[int, ...],
    precisions: tuple[str, ...],
    layers: tuple[str, ...],
    points: int,
    minutes: float | None,
    threads: int,
    out: Path,
    restart: bool,
    as_json: bool,
) -> None:
    """Measure the linear layers of MODEL on this device, dense and at several ranks, as its ONNX file holds them.

    Each shape is timed once, with the bias, the activation or the sum that follows it: dense, as two factors, and in
    pivoted form (the same product from fewer MACs, whose outputs must be joined). A few whole models at mixed ranks
    show what all else costs. Medians are repeated until they have settled, and refused where the device is too
    busy. Stopped, the same command goes on; finished, it does nothing. MODEL is a name of timm or a model folder:
    weights do not matter.
    """
    set_threads(threads)
    from flora.cli.output import StepProgress, print_json, print_table, say_when_done
    from flora.lowrank.checkpoint import load_model
    from flora.pipeline.latency import LatencyRequest, measure_latency
    from flora.ranks.cost import break_even_rank
    from flora.ranks.latency import LatencyModel

    request = LatencyRequest(
        layers=layers,
        runtime=runtime,
        batches=batches,
        precisions=precisions,
        threads=threads,
        points=points,
        minutes=minutes,
        restart=restart,
    )
    loaded = load_model(model, args=parse_model_kwargs(model_kwargs), untrained=True)
    with StepProgress(hidden=as_json) as shown:
        table = measure_latency(
            *(loaded, out, request),
            on_start=say_when_done(out),
            on_group=lambda done, of, what: shown.on_step(f"measuring {what}: {done} of {of} groups done"),
        )
    models = [LatencyModel(table, batch=batch, precision=precision) for batch, precision in table.conditions]
    if as_json:
        print_json(
            {
                "table": str(out),
                "break_even_ranks": [
                    {
                        "layers": list(one.layers),
                        "batch": one.batch,
                        "precision": one.precision,
                        "macs": break_even_rank(one.site.in_features, one.site.out_features),
                        "measured": one.break_even_rank,
                        "pivoted": one.fastest_pivoted,
                    }
                    for one in table.sites
                ],
                "models": [
                    {
                        "batch": one.batch,
                        "precision": one.precision,
                        "dense_ms": one.dense_ms,
                        "fixed_ms": one.fixed_ms,
                        "scale": one.scale,
                        "errors": one.errors(),
                    }
                    for one in models
                ],
            }
        )
        return
    print_table(
        [
            *("layers", "batch", "precision", "dense, ms", "break-even rank by MACs", "measured"),
            *("pivoted form fastest at ranks", "uncertain by"),
        ],
        [
            [
                f"{len(one.layers)} of {one.site}",
                str(one.batch),
                one.precision,
                f"{one.dense_ms:.3f}",
                str(break_even_rank(one.site.in_features, one.site.out_features)),
                str(one.break_even_rank),
                _extent(one.fastest_pivoted),
                f"{one.spread:.1%}",
            ]
            for one in table.sites
        ],
        title="From the break-even rank on, two factors are not faster than the dense layer",
    )
    print_table(
        ["whole model", "batch", "precision", "dense, ms", "outside the layers, ms", "worst error, unseen models"],
        [
            [
                table.model,
                str(one.batch),
                one.precision,
                f"{one.dense_ms:.2f}",
                f"{one.fixed_ms:.2f}",
                f"{max(map(abs, one.errors().values())):.1%}",
            ]
            for one in models
        ],
    )
    print(f"Wrote the latency table {out}")


def _extent(ranks: list[int]) -> str:
    return f"{ranks[0]} to {ranks[-1]}" if ranks else "none"
