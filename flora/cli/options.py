"""Options that several commands share, so that they read the same everywhere."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of a table.")
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="Threads for torch and ONNX Runtime (default: theirs)."
)
device_option = click.option("--device", default="cpu", show_default=True, help="torch device: cpu, cuda, cuda:1.")
workers_option = click.option(
    "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode images."
)
IMAGES_HELP = (
    "a folder or tar of class folders, or e.g. torch/cifar10,root=DIR,split=train; with ,limit=512 evenly spaced ones, "
    "with ,fold=1/10 every tenth, with ,except=1/10 all others"
)


def _points(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 <= value <= 100:
        raise click.BadParameter(f"{value} is not between 0 and 100 points of top-1.")
    return value


def max_drop_option(default: float | None, help_of_default: str) -> Callable:
    return click.option(
        "--max-drop",
        type=float,
        default=default,
        callback=_points,
        help=f"Points of top-1 that low rank may cost (default {help_of_default}).",
    )


fitness_option = click.option(
    "--fitness",
    type=click.Choice(["loss", "top1", "distance", "agreement"]),
    default="loss",
    show_default=True,
    help="How configs are judged. loss, top1: by the labels; distance, agreement: by the dense model, without labels.",
)
restart_option = click.option(
    "--restart",
    is_flag=True,
    help="Start anew: go on with nothing that a stopped run has left, and do what is finished again.",
)


def teacher_options(command: Callable) -> Callable:
    """Which model to learn from."""
    for decorator in (
        click.option(
            "--teacher-checkpoint",
            type=click.Path(path_type=Path),
            help="Weights of a teacher that is named by timm's name.",
        ),
        click.option(
            "--teacher",
            default="dense",
            show_default=True,
            help="Model to learn from: dense (MODEL, or the one that it came from), none, a model folder, or a timm "
            "name.",
        ),
    ):
        command = decorator(command)
    return command


def training_options(preset: str) -> Callable:
    """How to train; an option that is not given is what the preset says."""
    options = (
        click.option("--preset", help=f"Settings to start from: default, deit-s, deit-b, local ({preset})."),
        click.option("--epochs", type=int, help="Passes over the training images."),
        click.option("--batch-size", type=int, help="Images of one step, over all processes and passes."),
        click.option("--accumulation", type=int, help="Passes that one step accumulates."),
        click.option("--lr", type=float, help="Highest learning rate."),
        click.option("--min-lr", type=float, help="Learning rate at the end of the schedule."),
        click.option("--warmup-epochs", type=float, help="Epochs, or a part of one, in which the rate rises."),
        click.option("--warmup-lr", type=float, help="Learning rate that the warm-up begins with."),
        click.option("--optimizer", help="One of timm's optimizers, e.g. adamw."),
        click.option("--schedule", help="One of timm's schedules, e.g. cosine."),
        click.option("--weight-decay", type=float, help="Weight decay, for matrices only."),
        click.option("--clip-grad", type=float, help="Largest norm of the gradient."),
        click.option("--ema-decay", type=float, help="Keep a moving average of the weights, and write that."),
        click.option("--precision", type=click.Choice(["no", "fp16", "bf16"]), help="Mixed precision."),
        click.option(
            "--sampling",
            type=click.Choice(["low-rank-aware", "uniform"]),
            help="How a step draws its ranks; low-rank-aware: in proportion to 1 / the product of the rank ratios.",
        ),
        click.option("--sandwich", type=int, help="Each step trains the largest, the smallest and N drawn subnets."),
        click.option("--task-weight", type=float, help="Share of the labels in the loss beside the teacher (0 to 1)."),
        click.option("--temperature", type=float, help="Softmax temperature of the distillation."),
        click.option("--label-smoothing", type=float, help="Smoothing of the labels where they count."),
        click.option("--patch-drop", type=float, help="Share of patches that a ViT leaves out while training."),
        click.option(
            "--augmentation",
            type=click.Choice(["light", "imagenet"]),
            help="light: crops of at least three quarters; imagenet: the paper's, with RandAugment.",
        ),
        click.option("--seed", type=int, help="Seed of everything drawn."),
    )

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def space_options(command: Callable) -> Callable:
    """Which ranks a search may choose."""
    for decorator in (
        click.option(
            "--keep-redundant", is_flag=True, help="Keep ranks in the space that cost as much as the dense layer."
        ),
        click.option(
            "--space",
            metavar="SPACE",
            default="multiples=8",
            show_default=True,
            help="Ranks to choose from: eighths, sixths, sixteenths of the full rank (deit-b, deit-s, swin are the "
            "paper's), multiples=N, or ratios=R,R,...",
        ),
    ):
        command = decorator(command)
    return command


def batch_size_option(default: int) -> Callable:
    return click.option("--batch-size", type=click.IntRange(min=1), default=default, show_default=True)


def out_option(what: str) -> Callable:
    return click.option(
        "-o", "--out", type=click.Path(path_type=Path), required=True, help=f"Folder to write the {what} to."
    )


def model_options(command: Callable) -> Callable:
    """The ways to name a trained model: MODEL, with where its weights and arguments come from."""
    for decorator in (
        click.option(
            "--model-kwargs",
            "-K",
            multiple=True,
            metavar="KEY=VALUE",
            help="Argument of timm's create_model, e.g. -K num_classes=10 (repeatable).",
        ),
        click.option("--pretrained", is_flag=True, help="Fetch timm's pretrained weights from the hub."),
        click.option(
            "--checkpoint",
            type=click.Path(path_type=Path),
            help="Weights of MODEL: safetensors, or a torch file of plain weights.",
        ),
        click.argument("model"),
    ):
        command = decorator(command)
    return command


def parse_model_kwargs(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`("depth=6", "act_layer=gelu")` -> `{"depth": 6, "act_layer": "gelu"}`."""
    result = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--model-kwargs takes KEY=VALUE, got {pair!r}.")
        try:
            result[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            result[key] = text
    return result


def split_names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Callback for an option that takes names separated by commas."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if value else ()


TARGETS = ("onnx", "tensorrt-rtx", "tensorrt")


def _targets(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    from flora.errors import near_matches

    targets = split_names(context, parameter, value)
    for target in targets:
        if target not in TARGETS:
            raise click.BadParameter(f"{target!r} is none of {', '.join(TARGETS)}.{near_matches(target, TARGETS)}")
    return targets or ("onnx",)


targets_option = click.option(
    "--to",
    "targets",
    callback=_targets,
    default="onnx",
    show_default=True,
    help=f"What to build besides ONNX, which is always built: {', '.join(TARGETS)}.",
)


def set_threads(threads: int | None) -> None:
    """Apply --threads to torch."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def torch_device(name: str):
    """The torch device called `name`, or a usage error that says what there is."""
    import torch

    from flora.errors import BackendMissingError

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise click.UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BackendMissingError(
            f"--device {name} does not work here ({str(error).splitlines()[0]}); use --device cpu."
        ) from error
    return device
