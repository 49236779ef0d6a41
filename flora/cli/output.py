"""How results and progress are printed: results to stdout, as a table or JSON; progress to stderr."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """A table on stdout, the first column to the left and the others to the right; wide enough when piped."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table(title=title, title_justify="left")
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left", no_wrap=not position)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def print_next(wrote: str, *commands: str) -> None:
    """What was written, and the next command to type, or several to choose from."""
    print(f"Wrote {wrote}")
    for number, command in enumerate(commands):
        print(f"{'  or' if number else 'Next'}: {command}")


def say_when_done(out: Path, *, hidden: bool = False) -> Callable[[bool], None]:
    """A function to call when a job starts: it says on stderr when `out` is finished already."""

    def say(done: bool) -> None:
        if done and not hidden:
            click.echo(f"flora: {out} is finished; there is nothing to do. --restart does it again.", err=True)

    return say


@contextmanager
def progress(description: str, total: int | None, *, hidden: bool = False) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; yields a function that advances it by a number of steps.

    Told `what` was done, that function prints it as a line where stderr is no terminal.
    """
    console = Console(stderr=True, quiet=hidden)
    with Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(description, total=total)

        def advance(steps: int = 1, what: str = "") -> None:
            bar.advance(task, steps)
            if what and not console.is_terminal:
                _print_line(console, f"{description}: {what}")

        yield advance


def _print_line(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


class TrainingProgress:
    """A bar of steps and a line for each epoch, on stderr, inside `with`.

    The bar begins at the first step that it is told of, which is a later one in a run that goes on.
    """

    def __init__(self, epochs: int, *, hidden: bool = False) -> None:
        self._epochs = epochs
        self._bar = Progress(console=Console(stderr=True, quiet=hidden), transient=True, disable=hidden)
        self._task = self._bar.add_task("training", total=None)

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def on_step(self, step: int, steps: int, loss: float) -> None:
        self._bar.update(self._task, completed=step, total=steps, description=f"training, loss {loss:.3f}")

    def on_epoch(self, figures: dict[str, Any]) -> None:
        accuracies = [f"{name} {value:.2f} %" for name, value in figures.items() if name.startswith("top1")]
        line = [f"epoch {figures['epoch']} of {self._epochs}", f"loss {figures['loss']:.4f}", *accuracies]
        _print_line(self._bar.console, ", ".join([*line, f"{figures['seconds']:.1f} s"]))


class StepProgress:
    """What is being done, on stderr, inside `with`: a line that changes, or a line for each step if no terminal."""

    def __init__(self, *, hidden: bool = False) -> None:
        self._console = Console(stderr=True, quiet=hidden)
        self._status = self._console.status("starting")
        self._name = ""

    def __enter__(self) -> "StepProgress":
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._status.stop()

    def on_step(self, step: str) -> None:
        """`step` is a name, or a name, ": " and how far it is."""
        self._status.update(step)
        name = step.partition(":")[0]
        if name != self._name and not self._console.is_terminal:
            _print_line(self._console, name)
        self._name = name

    def on_line(self, line: str) -> None:
        """A line that stays."""
        _print_line(self._console, line)


def millions(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.2f} M"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"
