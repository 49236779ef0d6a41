"""What every benchmark does with its figures: print a table, judge the bars, write JSON and Markdown.

A script collects figures, names its bars, and ends with `finish`, which writes `results/NAME.json` and
`results/NAME.md` and exits 1 when a bar does not hold.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flora.artifact import new_file
from flora.cli.output import print_table
from flora.provenance import device_facts, now, versions

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Bar:
    """One promise: `value` against `limit`, and whether it holds."""

    name: str
    value: float
    limit: float
    holds: bool


def at_most(name: str, value: float, limit: float) -> Bar:
    """The bar that `value` is not above `limit`."""
    return Bar(name, value, limit, bool(value <= limit))


def at_least(name: str, value: float, limit: float) -> Bar:
    """The bar that `value` is not below `limit`."""
    return Bar(name, value, limit, bool(value >= limit))


def exactly(name: str, value: float, limit: float) -> Bar:
    """The bar that `value` is `limit`."""
    return Bar(name, value, limit, value == limit)


def finish(
    name: str,
    *,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    figures: Any,
    bars: Sequence[Bar],
    settings: dict[str, Any],
) -> None:
    """Write and print everything; ends the process with 0 when all bars hold and with 1 otherwise."""
    environment = {**device_facts(), **versions()}
    document = {
        "name": name,
        "created": now(),
        "environment": environment,
        "settings": settings,
        "figures": figures,
        "bars": [asdict(bar) for bar in bars],
    }
    bar_rows = [[bar.name, _number(bar.value), _number(bar.limit), "yes" if bar.holds else "NO"] for bar in bars]
    bar_columns = ["bar", "value", "limit", "holds"]
    markdown = [
        f"# {name}",
        "",
        f"{environment['cpu']}, {environment['cores']} cores; torch {environment['torch']}; {document['created']}.",
        f"Settings: {', '.join(f'{key} {value}' for key, value in settings.items())}.",
        "",
        *_markdown_table(columns, rows),
        "",
        *_markdown_table(bar_columns, bar_rows),
    ]
    with new_file(RESULTS / f"{name}.json") as partial:
        partial.write_text(json.dumps(document, indent=1) + "\n")
    with new_file(RESULTS / f"{name}.md") as partial:
        partial.write_text("\n".join(markdown) + "\n")
    print_table(columns, rows, title=name)
    print_table(bar_columns, bar_rows)
    sys.exit(0 if all(bar.holds for bar in bars) else 1)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def arm(benchmark: str, name: str, measure: Callable[[], Any], *, fresh: bool) -> Any:
    """The result of one part of a long benchmark: measured once, kept on disk, and read when the script resumes."""
    known = None if fresh else read_arm(benchmark, name)
    if known is not None:
        return known
    result = measure()
    with new_file(_arm_file(benchmark, name)) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")
    return result


def read_arm(benchmark: str, name: str) -> Any:
    """The result of an arm, None before it was measured."""
    file = _arm_file(benchmark, name)
    return json.loads(file.read_text()) if file.is_file() else None


def _arm_file(benchmark: str, name: str) -> Path:
    return RESULTS / "arms" / benchmark / f"{name}.json"
