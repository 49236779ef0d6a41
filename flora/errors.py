"""The errors a user can meet. Each message says what was given, what is allowed, and what to do."""

from collections.abc import Iterable
from difflib import SequenceMatcher


class FloraError(Exception):
    """Base of all errors that flora raises on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 1


class InputError(FloraError, ValueError):
    """An argument, a file or an artefact that cannot be used as given."""


class GateFailedError(FloraError):
    """A verification ran and did not pass; the files it judged are kept and labelled."""

    exit_code = 3


class BadLossError(FloraError):
    """A loss that is no number; training cannot go on as it was."""


class BackendMissingError(FloraError, ImportError):
    """A runtime or engine builder that is not installed, or does not work here."""

    exit_code = 4


def near_matches(given: str, allowed: Iterable[str]) -> str:
    """A sentence that names up to three near matches, or an empty string; a longer name counts by its beginning."""
    nearness = {name: SequenceMatcher(None, given, name[: len(given) + 1]).ratio() for name in allowed}
    near = sorted((name for name in nearness if nearness[name] > 0.6), key=lambda name: (-nearness[name], len(name)))
    return f" Did you mean {' or '.join(near[:3])}?" if near else ""


def few(names: Iterable[str], most: int = 6) -> str:
    """The names in one line, cut after `most` with the number left out."""
    names = list(names)
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
