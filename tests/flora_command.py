"""The command line as tests run it: in this process, or in one of its own where signals and limits are at work."""

import contextlib
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flora.cli import main

# A process forked from a server that has these already starts without the seconds that torch takes.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["flora.pipeline.export", "flora.pipeline.compress", "onnxscript"])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """All that was said on stderr, on one line, for messages that click wraps."""
        return " ".join(self.err.split())


def flora(*args: object) -> Outcome:
    """Run `flora ARGS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["flora", *map(str, args)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    return Outcome(code=code, out=out.getvalue(), err=err.getvalue())


def start_flora(*args: object, log: Path, before: Callable[[], None] | None = None) -> multiprocessing.Process:
    """Start `flora ARGS` in a process of its own, its output in `log`; `before` runs in it first."""
    process = PROCESSES.Process(target=_run, args=(tuple(map(str, args)), str(log), before))
    process.start()
    return process


def _run(args: tuple[str, ...], log: str, before: Callable[[], None] | None) -> None:
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(1)
    sys.argv = ["flora", *args]
    if before:
        before()
    main()


def assert_refused(outcome: Outcome, *words: str, code: int = 1) -> None:
    """A last line on stderr that holds all of `words`, steps alone before it, nothing on stdout, and the exit code."""
    assert outcome.code == code, outcome
    assert outcome.out == "", outcome
    *steps, said = [line for line in outcome.err.splitlines() if line.strip()]
    assert said.startswith("flora: "), outcome.err
    assert not any(step.startswith(("flora:", "Traceback", " ")) for step in steps), outcome.err
    for word in words:
        assert word in said, f"{word!r} is not said: {outcome.err}"


def assert_nothing_at(path: Path) -> None:
    """Neither `path` nor anything unfinished beside it."""
    assert not path.exists()
    assert leftovers(path.parent) == []


def leftovers(folder: Path) -> list[Path]:
    """Unfinished files and folders anywhere under `folder`."""
    return sorted(path for kind in ("*.partial", "*.previous") for path in Path(folder).rglob(kind))
