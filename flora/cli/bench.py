"""`flora bench`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flora.cli.options import batches_option, json_option

if TYPE_CHECKING:
    from flora.pipeline.bench_report import BenchReport, BenchRow


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--artifact",
    "artifacts",
    metavar="NAME",
    multiple=True,
    help="Time this artefact, by its name or its path in the bundle (repeatable; default: all that run here).",
)
@click.option(
    "--runtime",
    "runtimes",
    metavar="RUNTIME",
    multiple=True,
    help="Time on this runtime as well (repeatable): ort-cpu, ort-cuda, openvino; or the compact model in torch, "
    "torch-compiled, torch-cuda, torch-cuda-compiled.",
)
@batches_option("Batch sizes to time.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of each runtime.")
@click.option(
    "--seconds",
    type=float,
    default=30.0,
    show_default=True,
    help="Time each batch for so long at most, but at least for ten repeats of all.",
)
@click.option("--no-memory", is_flag=True, help="Measure no memory, for which each artefact gets a process of its own.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File for the report: NAME.json or NAME.csv.")
@json_option
def command(
    bundle: Path,
    artifacts: tuple[str, ...],
    runtimes: tuple[str, ...],
    batches: tuple[int, ...],
    threads: int,
    seconds: float,
    no_memory: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Time the artefacts of BUNDLE in one run, interleaved: latency, throughput and memory, at each batch size.

    What counts is the ratio to the first row, within repeats, with its 95 % interval: drift of the device hits all
    alike. Warm-up is measured, and repeats go on until enough is known or the time is over. The protocol is printed
    with the figures. Needs no torch unless one of its runtimes is asked for.

    Exit code 3 where files are not as they were exported (nothing is run), or where the device was too busy for figures
    that can be trusted: these are kept and labelled.
    """
    from flora.cli.output import StepProgress, print_json
    from flora.errors import GateFailedError, few
    from flora.pipeline.bench import BenchRequest, bench_bundle
    from flora.pipeline.bench_report import check_report_name

    if out is not None:
        check_report_name(out)
    request = BenchRequest(
        artifacts=artifacts,
        runtimes=runtimes,
        batches=batches,
        threads=threads,
        seconds=seconds,
        memory=not no_memory,
    )
    with StepProgress(hidden=as_json) as progress:
        report = bench_bundle(bundle, request, on_step=progress.on_step)
    if out is not None:
        report.write(out)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        _print(report)
        if out is not None:
            print(f"Wrote {out}")
    if report.uncertain:
        raise GateFailedError(
            f"The device was too busy: {few(report.uncertain)}. Figures are kept and labelled. Stop what else runs "
            "here, give more --seconds, or fewer --threads, which are disturbed less."
        )


def _print(report: "BenchReport") -> None:
    from flora.cli.output import print_table

    print_table(
        [
            "",
            "batch",
            "p50 ms",
            "p90 ms",
            "p99 ms",
            "images/s",
            "ratio",
            "95 % interval",
            "repeats",
            "peak MiB",
            "status",
        ],
        [_cells(row) for row in report.rows],
        title=f"{report.model} from {report.bundle}",
    )
    for name, precision, provider in dict.fromkeys((row.name, row.precision, row.provider) for row in report.rows):
        print(f"{name}: {precision}, ran on {provider}")
    for name, reason in report.left_out.items():
        print(f"Not timed: {name}: {reason}")
    for key, text in (report.protocol | report.device).items():
        print(f"{key}: {text}")
    print(f"versions: {', '.join(f'{name} {version}' for name, version in report.versions.items())}")


def _cells(row: "BenchRow") -> list[str]:
    latency = row.latency
    transfers = {None: "", False: ", without transfers", True: ", with transfers"}[row.transfers]
    memory = "-" if row.memory is None else f"{row.memory.peak_mib:.0f} (+{row.memory.growth_mib:.0f})"
    if row.memory is not None and row.memory.gpu_mib is not None:
        memory += f", GPU {row.memory.gpu_mib:.0f}"
    interval = latency.ratio_interval
    return [
        f"{row.name}{transfers}",
        str(latency.batch_size),
        f"{latency.median_ms:.4g}{'' if latency.spread is None else f' ± {latency.spread:.1%}'}",
        "-" if latency.p90_ms is None else f"{latency.p90_ms:.4g}",
        "-" if latency.p99_ms is None else f"{latency.p99_ms:.4g}",
        f"{latency.images_per_s:.4g}",
        f"{latency.ratio:.3f}",
        "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
        f"{latency.repeats} after {row.warm_up}",
        memory,
        f"{row.status or 'in torch'}{'' if row.is_certain else ', UNCERTAIN'}",
    ]
