"""What a long job keeps beside its output until it is done, so that the same command goes on where it was stopped."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from flora.artifact import new_file
from flora.errors import InputError, few

SETTINGS = "settings.json"


class WorkFolder:
    """The folder `OUT.work`: the settings of a job, and the files with which it resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, out: Path) -> Self:
        """The work folder of the job that writes `out`, whether it is there or not."""
        out = Path(out).absolute()
        return cls(out.with_name(f"{out.name}.work"))

    @classmethod
    def open(cls, out: Path, settings: Mapping[str, Any], *, restart: bool = False) -> Self:
        """The work folder of the job that writes `out`; made when there is none, emptied with `restart`.

        `settings` (JSON values) is what the result depends on: `InputError` where an unfinished job had others.
        """
        work = cls.of(out)
        if restart:
            work.remove()
        file = work.path / SETTINGS
        # Through JSON and back, so that tuples and lists compare equal.
        given = json.loads(json.dumps(settings))
        if not file.is_file():
            if work.path.exists() and (not work.path.is_dir() or any(map(_is_foreign, work.path.iterdir()))):
                raise InputError(f"{work.path} is in the way: it is no work folder of flora. Move or remove it.")
            with new_file(file) as partial:
                partial.write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")
            return work
        try:
            before = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{file} cannot be read: {error}. Start anew with --restart.") from error
        changed = [key for key in given.keys() | before.keys() if given.get(key) != before.get(key)]
        if changed:
            details = few(f"{key}: {_short(before.get(key))}, now {_short(given.get(key))}" for key in sorted(changed))
            raise InputError(
                f"{work.path} holds an unfinished job with other settings ({details}). "
                "Type the former command to go on with it, or add --restart to start anew."
            )
        return work

    def file(self, name: str) -> Path:
        return self.path / name

    def remove(self) -> None:
        """Delete the folder and all in it."""
        if (self.path / SETTINGS).is_file():
            shutil.rmtree(self.path)


def _is_foreign(path: Path) -> bool:
    """Whether a file is none that a job killed while it wrote its settings has left."""
    return not path.match(f".{SETTINGS}.*.partial")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
