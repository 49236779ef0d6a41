"""`flora calibrate`."""

from pathlib import Path

import click

from flora.cli.options import calibration_options, json_option, runtime_option, split_names, threads_option


@click.command("calibrate")
@click.argument("model", type=click.Path(path_type=Path))
@calibration_options
@click.option(
    "--precision", type=click.Choice(["int8", "fp8"]), default="int8", show_default=True, help="What to quantize to."
)
@click.option(
    "--keep",
    callback=split_names,
    metavar="LAYERS",
    help="Layers that stay in FP32 (FP16 in an FP8 file), e.g. head,blocks.0.mlp.fc1; flora sensitivity lists them.",
)
@runtime_option("What the error is measured on: ort-cpu, openvino or ort-cuda.")
@threads_option
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="ONNX file to write.")
@json_option
def command(
    model: Path,
    data: str,
    select_data: str | None,
    calib_images: int,
    seed: int,
    precision: str,
    keep: tuple[str, ...],
    runtime: str,
    threads: int | None,
    out: Path,
    as_json: bool,
) -> None:
    """Write MODEL in INT8 or FP8: an ONNX file with quantize and dequantize nodes, for every runtime.

    MODEL is an ONNX file in FP32 that flora export wrote, or its bundle. The way to calibrate is chosen by the error of
    the logits on images held out; nothing is recommended here: flora export --precision int8 also measures accuracy
    and latency.
    """
    from flora.cli.output import StepProgress, print_json, print_next, print_table
    from flora.pipeline.calibrate import CalibrationRequest, calibrate

    request = CalibrationRequest(
        data=data,
        select_data=select_data,
        images=calib_images,
        seed=seed,
        runtime=runtime,
        threads=threads,
        keep=keep,
    )
    with StepProgress(hidden=as_json) as shown:
        done = calibrate(model, out, precision, request, on_step=shown.on_step)
    if as_json:
        print_json(done.model_dump(mode="json"))
        return
    if done.quantization.trials:
        print_table(
            ["calibrated by", "signal to noise of the logits"],
            [[name, f"{decibels:.1f} dB"] for name, decibels in done.quantization.trials.items()],
            title=f"On {done.held_out} images held out, best first",
        )
    print_table(
        ["file", "calibration images", "signal to noise", "agrees with FP32", "cosine", "size", "of FP32"],
        [
            [
                str(out),
                str(done.quantization.images),
                f"{done.sqnr_db:.1f} dB",
                f"{done.agreement:.2%}",
                f"{done.cosine:.6f}",
                f"{done.size_bytes / 2**20:.2f} MiB",
                f"{done.size_bytes / done.source_bytes:.1%}",
            ]
        ],
    )
    print_next(f"the ONNX file {out}", f"flora sensitivity {model} --data {data} -o {out.with_suffix('.sensitivity')}")
