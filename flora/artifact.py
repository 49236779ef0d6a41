"""What all artefacts on disk share: atomic writes, digests, and JSON documents with a schema.

A file or folder appears under its final name only when it is complete: it is written beside it under a temporary name
and renamed. Whatever interrupts a command leaves the previous artefact or none.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from flora.errors import FloraError, InputError


class Document(BaseModel):
    """A JSON file of ours: frozen, unknown keys refused by name, `schema_version` checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    schema_version: Literal[1] = 1

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and validate `path`; raises `InputError` naming the file and each offending key."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise InputError(f"{path} does not exist.") from error
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {error}.") from error
        return cls.parse(text, origin=str(path))

    @classmethod
    def parse(cls, text: str, *, origin: str) -> Self:
        """Validate JSON `text`; `origin` names it in the message of the `InputError`."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            details = "; ".join(
                f"{'.'.join(map(str, problem['loc'])) or 'document'}: {problem['msg']}" for problem in error.errors()
            )
            raise InputError(f"{origin} is not a valid {cls.__name__}: {details}") from error

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    def save(self, path: Path) -> None:
        """Write the document atomically."""
        with new_file(path) as partial:
            partial.write_text(self.to_json(), encoding="utf-8")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on any failure."""
    path = Path(path)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, marker: str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` on success, remove it on any failure.

    A folder that stands at `path` is replaced only when it is empty or holds the file `marker`, which shows that it is
    an artefact of the same kind; otherwise `InputError`.
    """
    path = Path(path).absolute()
    check_replaceable(path, marker=marker)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        partial.chmod(0o777 & ~_umask())
        try:
            yield partial
            _swap_in(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(path: Path, *, marker: str) -> None:
    """Raise `InputError` when something stands at `path` that a new folder with `marker` must not replace."""
    path = Path(path)
    if path.is_file() or path.is_symlink():
        raise InputError(f"{path} is a file or a link; give the name of a folder to write.")
    if path.is_dir() and not (path / marker).is_file() and any(path.iterdir()):
        raise InputError(
            f"{path} exists and holds no {marker}, so it is not replaced. Give another output folder or remove it."
        )


def _swap_in(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    previous = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".previous", dir=path.parent))
    path.rename(previous)
    try:
        partial.rename(path)
    except BaseException:
        previous.rename(path)
        raise
    shutil.rmtree(previous)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise FloraError("The disk is full (or a quota): nothing was written. Free some space.") from error
        if error.errno in _WRONG_PLACES and _concerns(error, path):
            raise InputError(f"{path} cannot be written: {error.strerror}. Give another place.") from error
        raise


_WRONG_PLACES = (errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def _concerns(error: OSError, path: Path) -> bool:
    """Whether the error is about writing `path`, and not about a file that was read meanwhile."""
    if error.filename is None:
        return True
    file = Path(os.fsdecode(error.filename)).absolute()
    mine = file == path.absolute() or file in path.absolute().parents
    return mine or any(part.startswith(f".{path.name}.") for part in file.parts)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
