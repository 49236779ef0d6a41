"""How a report shows figures: each is taken out of its manifest by its path there, and keeps that path on the page."""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from markupsafe import Markup

NOTHING = Markup(
    '<span class="none"><span aria-hidden="true">&ndash;</span><span class="unseen">not measured</span></span>'
)
MINUS = "\N{MINUS SIGN}"


def _signed(text: str) -> str:
    """With a true minus, and no zeros before the digits of an exponent."""
    return re.sub(r"(e-?)0+(?=\d)", r"\1", text).replace("-", MINUS)


def share(value: float) -> str:
    """Of one, in percent."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """A difference in points, with its sign."""
    return _signed(f"{value:+.2f}") if round(value, 2) else "0.00"


def large(value: float) -> str:
    """A count with a prefix: 138.62 M."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f} {prefix}"
    return f"{value:.0f}"


def small(value: float) -> str:
    """Three digits, with a power of ten where it is tiny: 0.00117, 1.25e-7."""
    return _signed(f"{value:.3g}")


def tiny(value: float) -> str:
    """Two digits and their power of ten, so that a column of them can be compared: 1.2e-3."""
    return _signed(f"{value:.1e}") if value else "0"


FORMS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "percent": lambda value: f"{value:.2f} %",
    "share": share,
    "points": points,
    "error": lambda value: f"{value:.2f}",
    "ms": lambda value: f"{value:.3g} ms" if value < 1000 else f"{value:,.0f} ms",
    "seconds": lambda value: f"{value:.1f} s",
    "ratio": lambda value: f"{value:.2f}",
    "large": large,
    "size": lambda value: f"{value / 2**20:.2f} MiB",
    "count": lambda value: f"{value:,}",
    "small": small,
    "tiny": tiny,
    "cosine": lambda value: f"{value:.6f}",
    "db": lambda value: f"{value:.1f} dB",
}


def resolved(facts: Any, path: Iterable[str | int]) -> Any:
    """The value at `path` of a JSON document."""
    for step in path:
        facts = facts[step]
    return facts


class Figures:
    """Shows values of one JSON document, `facts`; `before` comes before each path that is written to the page."""

    def __init__(self, facts: Any, *before: str | int) -> None:
        self._facts, self._before = facts, before

    def __call__(self, form: str, *path: str | int | tuple[str | int, ...]) -> Markup:
        """The value at `path`, tuples in which are parts of it, in the words of `form`, in an element that holds it."""
        steps = [step for part in path for step in (part if isinstance(part, tuple) else (part,))]
        value = resolved(self._facts, steps)
        if value is None:
            return NOTHING
        return Markup('<data value="{}" data-of="{}">{}</data>').format(
            json.dumps(value), json.dumps([*self._before, *steps]), FORMS[form](value)
        )
