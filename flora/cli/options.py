"""Options that several commands share, so that they read the same everywhere."""

import ast
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from flora.ranks.evolution import SearchSettings
from flora.ranks.space import DEFAULT_SPACE
from flora.training.settings import AUGMENTATIONS, PRESETS

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
        help=f"Points of top-1 that low rank and each lower precision may cost (default {help_of_default}).",
    )


threshold_option = click.option(
    "--threshold",
    "thresholds",
    multiple=True,
    metavar="KIND.NAME=VALUE",
    help="Another limit for one kind of stage, such as fp16.min_agreement=0.95 or int8.max_kl=none; may be repeated.",
)
expect_option = click.option(
    "--expect-top1",
    type=click.FloatRange(min=0, max=100),
    metavar="PERCENT",
    help="What the dense model is known to reach on these images (0 expects nothing); much less fails the gate at "
    "once, for then they are preprocessed or labelled in another way.",
)
pictures_option = click.option(
    "--no-pictures",
    "pictures",
    flag_value=False,
    default=True,
    help="Name the images that a step sees most unlike the one before, without their pictures in the bundle.",
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


# Options by the name of the setting that they change, where the two differ.
SETTING_OF = {"lr": "learning_rate", "min_lr": "min_learning_rate", "warmup_lr": "warmup_learning_rate"}


def training_options(preset: str) -> Callable:
    """How to train; an option that is not given is what the preset says, and help names what `preset` does."""
    settings = PRESETS[preset]
    augmentation = next(name for name, value in AUGMENTATIONS.items() if value == settings.augmentation)

    def option(name: str, help: str, type: Any = None) -> Callable:
        setting = name.replace("-", "_")
        value = getattr(settings, SETTING_OF.get(setting, setting))
        shown = augmentation if name == "augmentation" else f"{value:g}" if isinstance(value, float) else value
        return click.option(f"--{name}", type=type, help=f"{help} (default: {'none' if value is None else shown})")

    options = (
        click.option(
            "--preset",
            help=f"Settings to start from: {', '.join(PRESETS)}; the defaults below are those of '{preset}'.",
        ),
        option("epochs", "Passes over the training images.", int),
        option("batch-size", "Images of one step, over all processes and passes.", int),
        option("accumulation", "Passes that one step accumulates.", int),
        option("lr", "Highest learning rate.", float),
        option("min-lr", "Learning rate at the end of the schedule.", float),
        option("warmup-epochs", "Epochs, or a part of one, in which the rate rises.", float),
        option("warmup-lr", "Learning rate that the warm-up begins with.", float),
        option("optimizer", "One of timm's optimizers, e.g. adamw."),
        option("schedule", "One of timm's schedules, e.g. cosine."),
        option("weight-decay", "Weight decay, for matrices only.", float),
        option("clip-grad", "Largest norm of the gradient.", float),
        option("ema-decay", "Keep a moving average of the weights, and write that.", float),
        option("precision", "Mixed precision.", click.Choice(["no", "fp16", "bf16"])),
        option(
            "sampling",
            "How a step draws its ranks; low-rank-aware: in proportion to 1 / the product of the rank ratios.",
            click.Choice(["low-rank-aware", "uniform"]),
        ),
        option("sandwich", "Each step trains the largest, the smallest and N drawn subnets.", int),
        option("task-weight", "Share of the labels in the loss beside the teacher (0 to 1).", float),
        option("temperature", "Softmax temperature of the distillation.", float),
        option("label-smoothing", "Smoothing of the labels where they count.", float),
        option("patch-drop", "Share of patches that a ViT leaves out while training.", float),
        option(
            "augmentation",
            "light: crops of at least three quarters; imagenet: the paper's, with RandAugment.",
            click.Choice(list(AUGMENTATIONS)),
        ),
        option("seed", "Seed of everything drawn.", int),
    )

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


population_option = click.option(
    "--population",
    type=int,
    default=SearchSettings.population,
    show_default=True,
    help="Configs in a generation of the search.",
)
generations_option = click.option(
    "--generations",
    type=int,
    default=SearchSettings.generations,
    show_default=True,
    help="Generations after the first one.",
)


def space_options(command: Callable) -> Callable:
    """Which ranks a search may choose."""
    for decorator in (
        click.option(
            "--keep-redundant", is_flag=True, help="Keep ranks in the space that cost as much as the dense layer."
        ),
        click.option(
            "--space",
            metavar="SPACE",
            default=DEFAULT_SPACE,
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


model_kwargs_option = click.option(
    "--model-kwargs",
    "-K",
    multiple=True,
    metavar="KEY=VALUE",
    help="Argument of timm's create_model, e.g. -K num_classes=10 (repeatable).",
)


def model_options(command: Callable) -> Callable:
    """The ways to name a trained model: MODEL, with where its weights and arguments come from."""
    for decorator in (
        model_kwargs_option,
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


def batch_sizes(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Callback for an option that takes batch sizes separated by commas."""
    try:
        return tuple(dict.fromkeys(int(part) for part in value.split(",")))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} are no batch sizes; write 1,8,32.") from error


def batches_option(help_text: str) -> Callable:
    return click.option(
        "--batch",
        "batches",
        metavar="N,N,...",
        callback=batch_sizes,
        default="1,8",
        show_default=True,
        help=help_text,
    )


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


def batches_of(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int, int] | None:
    """Callback for an option that takes MIN,OPT,MAX."""
    if value is None:
        return None
    try:
        smallest, usual, largest = (int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not MIN,OPT,MAX, such as 1,8,32.") from error
    if not 1 <= smallest <= usual <= largest:
        raise click.BadParameter(f"{value!r}: the batches must rise, 1 <= MIN <= OPT <= MAX.")
    return smallest, usual, largest


def _profiles(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(batches_of(context, parameter, value) for value in values)


def engine_options(command: Callable) -> Callable:
    """How engines are built; the names are the fields of `BuildOptions`, and the folder of what TensorRT times."""
    for decorator in (
        click.option(
            "--timing-cache",
            type=click.Path(path_type=Path, file_okay=False),
            help="Folder for what TensorRT times while it builds (default: flora/timing in your cache folder).",
        ),
        click.option(
            "--version-compatible", is_flag=True, help="TensorRT engines that load in later versions too; slower."
        ),
        click.option(
            "--hardware-compatible",
            type=click.Choice(["same-capability", "ampere-plus"]),
            help="TensorRT engines for other GPUs too: of the same compute capability, or all from Ampere on; slower.",
        ),
        click.option(
            "--builder-level",
            type=click.IntRange(0, 5),
            help="How long TensorRT looks for fast kernels (default: its own, 3).",
        ),
        click.option(
            "--workspace",
            "workspace_mib",
            type=click.IntRange(min=1),
            metavar="MIB",
            help="Memory that the kernels of an engine may use beside (default: all there is).",
        ),
        click.option(
            "--profile",
            "more_profiles",
            multiple=True,
            callback=_profiles,
            metavar="MIN,OPT,MAX",
            help="A further batch profile of engines beside --batch, such as 1,1,1 for single images (repeatable).",
        ),
    ):
        command = decorator(command)
    return command


def default_timing_cache() -> Path:
    """Where TensorRT's times are kept unless said otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flora" / "timing"


def runtime_option(help_text: str) -> Callable:
    return click.option("--runtime", metavar="RUNTIME", default="ort-cpu", show_default=True, help=help_text)


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
        torch.empty(1, device=_of_this_process(device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BackendMissingError(
            f"--device {name} does not work here ({str(error).splitlines()[0]}); use --device cpu."
        ) from error
    return device


def _of_this_process(device):
    """`device`, or under torchrun the GPU that Accelerate gives this process, where the number is left to it."""
    import torch

    if device.type != "cuda" or device.index is not None or not torch.cuda.device_count():
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def calibration_options(command: Callable) -> Callable:
    """The images that one file is calibrated on, and those that errors are measured on."""
    for decorator in (
        seed_option("Which of --data are taken."),
        calib_images_option("--data"),
        click.option(
            "--select-data",
            metavar="IMAGES",
            help="Images that errors are measured on (default: every fourth of --data, held out).",
        ),
        click.option(
            "--data", metavar="IMAGES", required=True, help=f"Images to calibrate on, labelled or not: {IMAGES_HELP}."
        ),
    ):
        command = decorator(command)
    return command


def precision_options(flag: str) -> Callable:
    """Which precisions besides FP32 an export tries, by the option `flag`, and what they must show."""
    decorators = (
        click.option(
            "--require",
            metavar="SHARE",
            help='Fail unless so much of the time in products is really computed so, such as "int8>=80%".',
        ),
        click.option(
            "--compare", is_flag=True, help="Build the dense model in the same precisions: what low rank adds."
        ),
        calib_images_option("--calib-data"),
        click.option(
            flag,
            "precisions",
            callback=split_names,
            metavar="LIST",
            help="Precisions besides FP32 to try: fp16, bf16, int8, int8-fp16 and fp8 (for engines), or auto for those "
            "that can pay on the runtime. The fastest file that passes the gate is recommended.",
        ),
    )

    def decorated(command: Callable) -> Callable:
        for decorator in decorators:
            command = decorator(command)
        return command

    return decorated


def calib_images_option(images: str) -> Callable:
    return click.option(
        "--calib-images",
        type=click.IntRange(min=1),
        default=128,
        show_default=True,
        help=f"How many of {images} activation ranges are measured on, as many of each class.",
    )


def seed_option(help_text: str) -> Callable:
    return click.option("--seed", type=int, default=0, show_default=True, help=help_text)
