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
    """A progress bar on stderr; yields a function that advances it by a number of steps."""
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps=1: bar.advance(task, steps)


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
        self._bar.console.print(", ".join([*line, f"{figures['seconds']:.1f} s"]), highlight=False, soft_wrap=True)


@contextmanager
def status(*, hidden: bool = False) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done; yields the function that changes it."""
    console = Console(stderr=True, quiet=hidden)
    with console.status("starting") as line:
        yield line.update


def millions(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.2f} M"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"
