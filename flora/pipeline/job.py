"""How filter, train and search begin, on one process or many: anew, where they were stopped, or not at all."""

from collections.abc import Callable
from pathlib import Path

from flora.resume import Job, WorkFolder
from flora.training.processes import is_main, wait

# Called when a job begins, and told whether its output is there already.
OnStart = Callable[[bool], None]


def begin(job: Job, out: Path, *, restart: bool, on_start: OnStart) -> WorkFolder | None:
    """The work folder of the job that writes `out`; None where `out` is what it would write.

    Every process refuses the same, for all look before one writes.
    """
    work = WorkFolder.of(out)
    # Where a work folder has these settings too, the output is being made again, or the end was all but reached.
    done = not restart and job.is_in(out) and not job.is_in(work.path)
    if not done:
        work.check(job, restart=restart)
    on_start(done)
    wait()
    if is_main() and not done:
        work.open(job, restart=restart)
    wait()
    return None if done else work
