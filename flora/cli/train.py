"""`flora train`."""

from pathlib import Path

import click

from flora.cli.options import (
    IMAGES_HELP,
    device_option,
    json_option,
    out_option,
    restart_option,
    set_threads,
    teacher_options,
    threads_option,
    torch_device,
    training_options,
    workers_option,
)


@click.command("train")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", metavar="IMAGES", required=True, help=f"Training images: {IMAGES_HELP}.")
@out_option("trained model")
@teacher_options
@click.option(
    "--teacher-cache",
    type=click.Path(path_type=Path),
    help="Folder that keeps the teacher's answers; later runs with the same seed and augmentation read them.",
)
@click.option("--top-k", type=click.IntRange(min=1), default=100, show_default=True, help="Classes kept of an answer.")
@click.option("--select-data", metavar="IMAGES", help="Images to evaluate on after each epoch.")
@click.option("--tensorboard", type=click.Path(path_type=Path), help="Folder for TensorBoard's event files.")
@training_options("default")
@workers_option
@device_option
@threads_option
@restart_option
@json_option
def command(
    model: Path,
    data: str,
    out: Path,
    teacher: str,
    teacher_checkpoint: Path | None,
    teacher_cache: Path | None,
    top_k: int,
    select_data: str | None,
    tensorboard: Path | None,
    workers: int,
    device: str,
    threads: int | None,
    restart: bool,
    as_json: bool,
    **training,
) -> None:
    """Train MODEL, a supernet folder, or fine-tune it, a compact or dense model folder.

    A supernet gets other ranks in each step; the nested factors share what they learn, and components above the ranks
    of a step do not move. Stopped, the same command goes on from the last finished epoch, with another --lr, --min-lr,
    --warmup-lr, --clip-grad or --precision too; finished, it does nothing. On several devices: torchrun --no-python
    --nproc_per_node N flora train ...
    """
    set_threads(threads)
    from flora.cli.output import TrainingProgress, print_json, print_next, print_table, say_when_done
    from flora.cli.training import settings_from_options
    from flora.lowrank.checkpoint import is_supernet_folder
    from flora.pipeline.train import TrainRequest, train
    from flora.training.processes import is_main, processes

    where = torch_device(device)
    processes(where)
    settings = settings_from_options(training)
    request = TrainRequest(
        data=data,
        settings=settings,
        teacher=teacher,
        teacher_checkpoint=teacher_checkpoint,
        teacher_cache=teacher_cache,
        top_k=top_k,
        select_data=select_data,
        tensorboard=tensorboard,
        device=where,
        workers=workers,
        restart=restart,
    )
    with TrainingProgress(settings.epochs, hidden=as_json or not is_main()) as shown:
        trained = train(
            *(model, out, request),
            on_start=say_when_done(out, hidden=not is_main()),
            on_step=shown.on_step,
            on_epoch=shown.on_epoch,
        )
    if not is_main():
        return
    history = trained.config.training[-1].history
    if as_json:
        print_json({"model": str(out), "history": list(history)})
        return
    columns = list(history[-1])
    print_table(columns, [[f"{line[column]:g}" for column in columns] for line in history])
    is_supernet = is_supernet_folder(out)
    follow = f"flora search {out} --budget macs=50% --select-data IMAGES -o {out}-search"
    print_next(f"the model {out}", follow if is_supernet else f"flora export {out} --eval-data IMAGES -o {out}-bundle")
