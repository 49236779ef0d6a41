"""How jobs begin, on one process or many: anew, where they were stopped, or not at all; and where a chain lies."""

from collections.abc import Callable
from pathlib import Path

from flora.errors import InputError
from flora.resume import SETTINGS, Job, WorkFolder
from flora.training.processes import is_main, wait

# Called when a job begins, and told whether its output is there already.
OnStart = Callable[[bool], None]


def finished(job: Job, out: Path, *, restart: bool) -> bool:
    """Whether `out` is what the job would write."""
    # Where a work folder has these settings too, the output is being made again, or the end was all but reached.
    return not restart and job.is_in(out) and not job.is_in(WorkFolder.of(out).path)


def begin(job: Job, out: Path, *, restart: bool, on_start: OnStart) -> WorkFolder | None:
    """The work folder of the job that writes `out`; None where `out` is what it would write.

    Every process refuses the same, for all look before one writes.
    """
    work = WorkFolder.of(out)
    done = finished(job, out, restart=restart)
    if not done:
        work.check(job, restart=restart)
    on_start(done)
    wait()
    if is_main() and not done:
        work.open(job, restart=restart)
    wait()
    return None if done else work


def folder_of_steps(out: Path) -> Path:
    """`OUT.work`, in which the steps to `out` lie; `InputError` where something else is there."""
    steps = WorkFolder.of(out).path
    if steps.exists() and (not steps.is_dir() or (steps / SETTINGS).exists()):
        raise InputError(f"{steps} is in the way: the steps to {out} are kept there. Move or remove it.")
    return steps


def forget_unfinished(*outs: Path) -> None:
    """Throw away what the unfinished jobs that write `outs` have left."""
    if is_main():
        for out in outs:
            WorkFolder.of(out).remove()
    wait()
