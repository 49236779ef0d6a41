"""`flora sensitivity`."""

from pathlib import Path

import click

from flora.cli.options import calibration_options, json_option, out_option, runtime_option, threads_option

SHOWN = 20


@click.command("sensitivity")
@click.argument("model", type=click.Path(path_type=Path))
@calibration_options
@runtime_option("What the way to calibrate is chosen on: ort-cpu, openvino or ort-cuda.")
@threads_option
@out_option("table and the figure")
@json_option
def command(
    model: Path,
    data: str,
    select_data: str | None,
    calib_images: int,
    seed: int,
    runtime: str,
    threads: int | None,
    out: Path,
    as_json: bool,
) -> None:
    """Measure how far each layer of MODEL, alone in INT8, moves the logits.

    MODEL is an ONNX file in FP32 that flora export wrote, or its bundle. Layers at the top of the table are those to
    keep in FP32; flora export --precision int8 does so by itself where its gate needs it.
    """
    from flora.cli.output import StepProgress, print_json, print_next, print_table
    from flora.pipeline.calibrate import CalibrationRequest, measured_sensitivity

    request = CalibrationRequest(
        data=data, select_data=select_data, images=calib_images, seed=seed, runtime=runtime, threads=threads
    )
    with StepProgress(hidden=as_json) as shown:
        found = measured_sensitivity(model, out, request, on_step=shown.on_step)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    print_table(
        ["layer", "products", "signal to noise of the logits"],
        [[error.layer, str(error.products), f"{error.sqnr_db:.1f} dB"] for error in found.layers[:SHOWN]],
        title=f"The {min(SHOWN, len(found.layers))} most sensitive of {len(found.layers)} layers, each alone in INT8 "
        f"({found.method}), on {found.images} images held out",
    )
    worst = found.layers[0].layer
    print_next(
        f"the table and the figure in {out}", f"flora calibrate {model} --data {data} --keep {worst} -o int8.onnx"
    )
