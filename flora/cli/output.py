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


def print_next(wrote: str, command: str | None = None) -> None:
    """What was written, and the next command to type."""
    print(f"Wrote {wrote}")
    if command:
        print(f"Next: {command}")


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
