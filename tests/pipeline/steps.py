"""What tests of chained steps look at: which steps were taken, and which files were written."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest


def taken(chain: Callable[[Callable[[str], None]], object], *, stop_at: str | None = None) -> list[str]:
    """Run `chain` with its `on_step`; the steps that were taken. With `stop_at`, interrupted where that one begins."""
    steps: list[str] = []

    def note(step: str) -> None:
        name = step.partition(":")[0]
        if name not in steps:
            steps.append(name)
        if stop_at and step.startswith(stop_at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if stop_at else nullcontext():
        chain(note)
    return steps


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """When and as which file each one under `folder` was written."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}
