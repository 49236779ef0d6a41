"""What a long job keeps, so that the same command goes on where it was stopped and does nothing twice.

The settings of a job lie in its work folder `OUT.work` until it is done, and in its output from then on. An output is
written whole or not at all, so one that holds the settings of a job is what the job would write.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator

from flora.artifact import Document
from flora.errors import InputError, few

SETTINGS = "settings.json"


class Job(Document):
    """`settings.json`: what the result of a job depends on, JSON values; images and weights by their content."""

    kind: Literal["flora job"] = "flora job"
    settings: dict[str, Any]
    # Names of settings with other values of which a stopped run may go on.
    may_change: tuple[str, ...] = Field(default=(), exclude=True)

    @field_validator("settings", mode="before")
    @classmethod
    def _from_json(cls, settings: Any) -> Any:
        """Through JSON and back, so that tuples and lists compare equal."""
        return json.loads(json.dumps(settings))

    def is_in(self, folder: Path) -> bool:
        """Whether `folder` is this job's: the finished output, or the work folder."""
        file = Path(folder) / SETTINGS
        return file.is_file() and Job.load(file).settings == self.settings


class WorkFolder:
    """The folder `OUT.work`: the settings of an unfinished job, and the files with which it resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, out: Path) -> Self:
        """The work folder of the job that writes `out`, whether it is there or not."""
        out = Path(out).absolute()
        return cls(out.with_name(f"{out.name}.work"))

    def check(self, job: Job, *, restart: bool = False) -> None:
        """Raise `InputError` where the folder is not flora's or, without `restart`, of a job with other settings."""
        file = self.path / SETTINGS
        if not file.is_file():
            if self.path.exists() and (not self.path.is_dir() or any(map(_is_foreign, self.path.iterdir()))):
                raise InputError(f"{self.path} is in the way: it is no work folder of flora. Move or remove it.")
            return
        if restart:
            return
        try:
            before, given = Job.load(file).settings, job.settings
        except InputError as error:
            raise InputError(f"{error} Start anew with --restart.") from error
        fixed = (given.keys() | before.keys()) - set(job.may_change)
        changed = [key for key in fixed if given.get(key) != before.get(key)]
        if changed:
            details = few(f"{key}: {_short(before.get(key))}, now {_short(given.get(key))}" for key in sorted(changed))
            raise InputError(
                f"{self.path} holds an unfinished job with other settings ({details}). "
                "Type the former command to go on with it, or add --restart to start anew."
            )

    def open(self, job: Job, *, restart: bool = False) -> None:
        """Make the folder where there is none; empty it with `restart`. From now on its settings are those of `job`."""
        self.check(job, restart=restart)
        if restart:
            self.remove()
        if not job.is_in(self.path):
            job.save(self.path / SETTINGS)

    def file(self, name: str) -> Path:
        return self.path / name

    def remove(self) -> None:
        """Delete the folder and all in it; to whatever kills this, it is there whole or not at all."""
        if (self.path / SETTINGS).is_file():
            gone = tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".previous", dir=self.path.parent)
            shutil.rmtree(self.path.rename(gone))


def _is_foreign(path: Path) -> bool:
    """Whether a file is none that a job killed while it wrote its settings has left."""
    return not path.match(f".{SETTINGS}.*.partial")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
