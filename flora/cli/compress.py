"""`flora compress`."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from flora.cli.options import (
    IMAGES_HELP,
    default_timing_cache,
    device_option,
    expect_option,
    fitness_option,
    generations_option,
    json_option,
    max_drop_option,
    model_options,
    out_option,
    parse_model_kwargs,
    pictures_option,
    population_option,
    precision_options,
    runtime_option,
    set_threads,
    split_names,
    targets_option,
    teacher_options,
    threads_option,
    threshold_option,
    torch_device,
    training_options,
    workers_option,
)
from flora.ranks.budget import goes_by_table
from flora.ranks.space import DEFAULT_SPACE

if TYPE_CHECKING:
    import torch

    from export.bundle import Bundle
    from flora.pipeline.compress import CompressRequest
    from flora.pipeline.export_request import ExportRequest
    from flora.pipeline.training_free import TrainingFreeRequest


@click.command("compress")
@model_options
@click.option(
    "--method",
    type=click.Choice(["training-free", "supernet"]),
    default="training-free",
    show_default=True,
    help="training-free: probe every layer and allocate ranks. supernet: filter, train and search, as the paper does.",
)
@click.option(
    "--budget",
    metavar="BUDGET",
    help="macs=45% of the dense model, macs=2.7G or params=12M; latency=0.6x or latency=12ms of one thread "
    "(or --threads), at batch 8 or, with @b1, at another; training-free also drop=0.5: the fastest ranks that lose at "
    "most half a point on the selection images, before the factors are fitted again.",
)
@click.option(
    "--family",
    metavar="BUDGETS",
    help="Several budgets in place of one, such as 70%,50%,35% (of the MACs) or latency=0.8x,latency=0.6x: OUT gets a "
    "bundle for each.",
)
@click.option(
    "--calib-data",
    metavar="IMAGES",
    help=f"Calibration images, labels not needed (supernet: by default 512 of the training images): {IMAGES_HELP}.",
)
@click.option(
    "--select-data",
    metavar="IMAGES",
    help="Images to choose by. training-free: labels not needed, by default every fourth calibration image. supernet: "
    "by default every tenth training image; filter takes 2000, search 5000.",
)
@click.option(
    "--latency-table",
    type=click.Path(path_type=Path),
    help="Table of flora latency-table for a budget of latency or drop; without one it is measured.",
)
@click.option("--data", metavar="IMAGES", help="Training images, for --method supernet.")
@click.option(
    "--eval-data",
    metavar="IMAGES",
    help="Images that nothing else has seen, read once at the end. Without them the bundle is verified on the "
    "selection images, and says so.",
)
@runtime_option("What runs the ONNX files: ort-cpu, ort-cuda or ort-tensorrt (ONNX Runtime), or openvino.")
@out_option("bundle")
@targets_option
@precision_options("--export-precision")
@click.option(
    "--layers", callback=split_names, default="qkv,proj,fc1,fc2", show_default=True, help="Linear layers to factorize."
)
@click.option(
    "--space",
    metavar="SPACE",
    help="As in flora build (default: multiples=8, for a budget of latency or drop multiples=16; for a supernet, "
    f"{DEFAULT_SPACE}).",
)
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
@max_drop_option(None, "1, and 0.5 from FP32 to FP16 or BF16")
@threshold_option
@expect_option
@pictures_option
@workers_option
@device_option
@threads_option
@click.option(
    "--restart",
    is_flag=True,
    help="Throw away what an unfinished step has left. Finished steps stay where they fit (to do all again, remove "
    "OUT.work).",
)
@click.option("--dry-run", is_flag=True, help="Say what is within reach, and how long each step takes; then stop.")
@json_option
@click.pass_context
def command(
    context: click.Context,
    /,
    model: str,
    checkpoint: Path | None,
    pretrained: bool,
    model_kwargs: tuple[str, ...],
    method: str,
    budget: str | None,
    family: str | None,
    calib_data: str | None,
    select_data: str | None,
    latency_table: Path | None,
    data: str | None,
    eval_data: str | None,
    runtime: str,
    out: Path,
    targets: tuple[str, ...],
    precisions: tuple[str, ...],
    calib_images: int,
    compare: bool,
    require: str | None,
    layers: tuple[str, ...],
    space: str | None,
    share: float,
    fitness: str,
    population: int,
    generations: int,
    teacher: str,
    teacher_checkpoint: Path | None,
    finetune_epochs: int | None,
    max_drop: float | None,
    thresholds: tuple[str, ...],
    expect_top1: float | None,
    pictures: bool,
    workers: int,
    device: str,
    threads: int | None,
    restart: bool,
    dry_run: bool,
    as_json: bool,
    **training,
) -> None:
    """Compress a trained MODEL to a budget, and ship it with proof.

    By default without training, in minutes: factorizes the model, probes what each layer's rank costs, allocates ranks
    within the budget, fits the factors again to what their layers receive in the compact model, exports and verifies.
    With --method supernet it filters the candidates of a supernet, trains it, searches it, and fine-tunes what was
    found. What the steps make stays in OUT.work. Stopped, the same command goes on; with other options or other images,
    the steps that depend on them are done again; finished, it does nothing. Exit code 3 when a gate fails.
    """
    set_threads(threads)
    is_supernet = method == "supernet"
    _reject_options(context, is_supernet)
    from export.bundle import MANIFEST
    from flora.artifact import check_replaceable
    from flora.cli.output import StepProgress
    from flora.cli.plan import print_plans
    from flora.cli.verification import print_bundle, print_family
    from flora.lowrank.checkpoint import load_model
    from flora.pipeline.compress import CompressRequest, compress, refuse_early
    from flora.pipeline.export_request import ExportRequest
    from flora.pipeline.family import FAMILY, budgets_of_family, compress_family
    from flora.pipeline.job import folder_of_steps
    from flora.pipeline.plan import plan_of
    from flora.pipeline.timed import check_budget
    from flora.pipeline.training_free import TrainingFreeRequest, compress_training_free
    from flora.pipeline.training_free import refuse_early as refuse_early_training_free
    from flora.training.processes import is_main, processes

    where = torch_device(device)
    processes(where)
    export = ExportRequest(
        eval_data=eval_data,
        runtime=runtime,
        targets=targets,
        precisions=precisions,
        calib_images=calib_images,
        compare=compare,
        require=require,
        max_drop=max_drop,
        thresholds=thresholds,
        expect_top1=expect_top1,
        pictures=pictures,
        timing_cache=default_timing_cache(),
        threads=threads,
        command=("flora", *sys.argv[1:]),
    )
    loaded = load_model(model, args=parse_model_kwargs(model_kwargs), checkpoint=checkpoint, pretrained=pretrained)
    budgets = budgets_of_family(family) if family is not None else (cast(str, budget),)
    if family is not None and latency_table is not None and not any(map(goes_by_table, budgets)):
        raise click.UsageError(f"--latency-table serves budgets such as latency=0.6x; {family} has none.")
    requests = {}
    for one in budgets:
        serves = family is None or goes_by_table(one)
        params = context.params | {"latency_table": latency_table if serves else None}
        requests[one] = (
            _supernet_request(params, one, export, where, training)
            if is_supernet
            else _training_free_request(params, one, export, where)
        )

    def check_early(request: CompressRequest | TrainingFreeRequest) -> None:
        if isinstance(request, CompressRequest):
            refuse_early(loaded, request)
        else:
            refuse_early_training_free(loaded, request)

    if dry_run:
        check_replaceable(out, marker=MANIFEST if family is None else FAMILY)
        check_early(next(iter(requests.values())))
        if is_main():
            print_plans({one: plan_of(loaded, request) for one, request in requests.items()}, as_json=as_json)
        return

    def run(budget: str, bundle: Path) -> "Bundle":
        def say_when_there(done: bool) -> None:
            if done and is_main() and not as_json:
                click.echo(
                    f"flora: {bundle} is finished; there is nothing to do. Remove it to measure again.", err=True
                )

        # Factorizing uses up the module; the steps lie beside the family, for all its members.
        own = replace(loaded, module=copy.deepcopy(loaded.module)) if family is not None else loaded
        steps, request = folder_of_steps(out), requests[budget]
        if family is not None:
            shown.on_line(f"budget {budget}")
        if isinstance(request, CompressRequest):
            return compress(
                *(own, bundle, request),
                on_start=say_when_there,
                on_step=shown.on_step,
                on_line=shown.on_line,
                steps=steps,
            )
        return compress_training_free(
            *(own, bundle, request), on_start=say_when_there, on_step=shown.on_step, steps=steps
        )

    with StepProgress(hidden=as_json or not is_main()) as shown:
        if family is not None:
            for request in requests.values():  # all of them before the first takes its time
                check_budget(loaded, request)
            members, bundles = compress_family(loaded.config.model, budgets, out, run)
        else:
            bundles = [run(budgets[0], out)]
    if not is_main():
        return
    data_to_verify = eval_data or "IMAGES"
    if family is not None:
        print_family(members, bundles, out, data_to_verify, as_json=as_json)
        return
    print_bundle(
        bundles[0],
        f"the bundle {out} (its steps lie in {out}.work)",
        f"flora verify {out} --data {data_to_verify}",
        as_json=as_json,
    )


def _training_free_request(
    params: dict[str, Any], budget: str, export: "ExportRequest", device: "torch.device"
) -> "TrainingFreeRequest":
    from flora.pipeline.training_free import TrainingFreeRequest

    names = ("calib_data", "select_data", "latency_table", "layers", "space", "workers", "restart")
    return TrainingFreeRequest(budget=budget, export=export, device=device, **{name: params[name] for name in names})


def _supernet_request(
    params: dict[str, Any], budget: str, export: "ExportRequest", device: "torch.device", training: dict[str, Any]
) -> "CompressRequest":
    from flora.cli.training import settings_from_options
    from flora.pipeline.compress import CompressRequest
    from flora.ranks.evolution import SearchSettings

    settings = settings_from_options(training)
    more = params["finetune_epochs"]
    names = ("data", "calib_data", "select_data", "latency_table", "layers", "share", "fitness", "teacher")
    return CompressRequest(
        budget=budget,
        export=export,
        settings=settings,
        finetune_epochs=settings.epochs if more is None else more,
        space=params["space"] or DEFAULT_SPACE,
        search=SearchSettings.of_size(params["population"], params["generations"], seed=training["seed"] or 0),
        device=device,
        **{name: params[name] for name in (*names, "teacher_checkpoint", "workers", "restart")},
    )


def _reject_options(context: click.Context, is_supernet: bool) -> None:
    """Usage errors for a budget and images that are missing, and for options of the other method."""
    if (context.params["budget"] is None) == (context.params["family"] is None):
        raise click.UsageError("Give either --budget BUDGET, such as macs=50%, or --family BUDGETS for several.")
    if is_supernet and context.params["data"] is None:
        raise click.UsageError("--method supernet trains, so it needs --data IMAGES.")
    if context.params["expect_top1"] is not None and context.params["eval_data"] is None:
        raise click.UsageError("--expect-top1 is what the dense model reaches on --eval-data IMAGES; name them.")
    if not is_supernet and context.params["calib_data"] is None:
        raise click.UsageError(
            "Without training, --calib-data IMAGES is needed; to train, give --method supernet --data IMAGES."
        )
    for option in () if is_supernet else context.command.params:
        given = context.get_parameter_source(option.name or "") is not ParameterSource.DEFAULT
        if given and option.name not in _BOTH:
            raise click.UsageError(f"{option.opts[0]} belongs to --method supernet.")


# Options of either method.
_BOTH = {
    *("model", "checkpoint", "pretrained", "model_kwargs", "method", "budget", "calib_data", "select_data"),
    *("eval_data", "out", "targets", "layers", "space", "max_drop", "workers", "device", "threads", "restart"),
    *("as_json", "latency_table", "family", "runtime", "dry_run"),
    *("precisions", "calib_images", "compare", "require", "thresholds", "expect_top1", "pictures"),
}
