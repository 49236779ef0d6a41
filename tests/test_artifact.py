"""An artefact appears under its final name complete or not at all, and its JSON is refused by key."""

import errno
import json
import os
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from flora.artifact import Document, check_replaceable, new_file, new_folder, sha256_of_file
from flora.errors import FloraError, InputError

MARKER = "config.json"
INTERRUPTIONS = [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(1)]


class Recipe(Document):
    name: str
    steps: tuple[int, ...] = ()


def _write(folder: Path, content: str) -> None:
    (folder / MARKER).write_text(content)
    (folder / "sub").mkdir()
    (folder / "sub" / "weights").write_text(content)


def _interrupted(new: AbstractContextManager[Path], error: BaseException) -> None:
    with new as partial:
        partial.write_text("half") if not partial.is_dir() else _write(partial, "half")
        raise error


def _read(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path: Path):
    path = tmp_path / "deep" / "file"
    with new_file(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert _names(path.parent) == ["file"]


def test_a_folder_appears_when_it_is_complete(tmp_path: Path):
    path = tmp_path / "deep" / "model"
    with new_folder(path, marker=MARKER) as partial:
        _write(partial, "new")
        assert not path.exists()
    assert _read(path) == {MARKER: "new", "sub/weights": "new"}
    assert _names(path.parent) == ["model"]


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=repr)
def test_an_interrupted_file_leaves_nothing(tmp_path: Path, error: BaseException):
    with pytest.raises(type(error)):
        _interrupted(new_file(tmp_path / "file"), error)
    assert _names(tmp_path) == []


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=repr)
def test_an_interrupted_file_leaves_the_previous_one(tmp_path: Path, error: BaseException):
    (tmp_path / "file").write_text("old")
    with pytest.raises(type(error)):
        _interrupted(new_file(tmp_path / "file"), error)
    assert (tmp_path / "file").read_text() == "old"
    assert _names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=repr)
def test_an_interrupted_folder_leaves_nothing(tmp_path: Path, error: BaseException):
    with pytest.raises(type(error)):
        _interrupted(new_folder(tmp_path / "model", marker=MARKER), error)
    assert _names(tmp_path) == []


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=repr)
def test_an_interrupted_folder_leaves_the_previous_one(tmp_path: Path, error: BaseException):
    with new_folder(tmp_path / "model", marker=MARKER) as partial:
        _write(partial, "old")
    with pytest.raises(type(error)):
        _interrupted(new_folder(tmp_path / "model", marker=MARKER), error)
    assert _read(tmp_path / "model") == {MARKER: "old", "sub/weights": "old"}
    assert _names(tmp_path) == ["model"]


def test_a_new_folder_replaces_the_previous_one_whole(tmp_path: Path):
    with new_folder(tmp_path / "model", marker=MARKER) as partial:
        _write(partial, "old")
        (partial / "only in the old one").touch()
    with new_folder(tmp_path / "model", marker=MARKER) as partial:
        _write(partial, "new")
    assert _read(tmp_path / "model") == {MARKER: "new", "sub/weights": "new"}
    assert _names(tmp_path) == ["model"]


def test_an_empty_folder_is_replaced(tmp_path: Path):
    (tmp_path / "model").mkdir()
    with new_folder(tmp_path / "model", marker=MARKER) as partial:
        _write(partial, "new")
    assert _read(tmp_path / "model")[MARKER] == "new"


def test_a_folder_without_the_marker_is_never_replaced(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("precious")
    with (
        pytest.raises(InputError, match=rf"photos exists and holds no {MARKER}"),
        new_folder(tmp_path / "photos", marker=MARKER) as partial,
    ):
        _write(partial, "new")
    assert _read(tmp_path / "photos") == {"holiday.jpg": "precious"}
    assert _names(tmp_path) == ["photos"]


@pytest.mark.parametrize("kind", ["file", "link to a folder", "broken link"])
def test_what_is_no_folder_is_never_replaced(tmp_path: Path, kind: str):
    path, target = tmp_path / "model", tmp_path / "target"
    if kind == "file":
        path.write_text("precious")
    else:
        path.symlink_to(target)
        if kind == "link to a folder":
            target.mkdir()
    with pytest.raises(InputError, match="is a file or a link"):
        check_replaceable(path, marker=MARKER)


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for new in (new_file(tmp_path / "out"), new_folder(tmp_path / "out", marker=MARKER)):
        with pytest.raises(FloraError, match="disk is full"):
            _interrupted(new, full)
    assert _names(tmp_path) == []


def _write_without_space(path: Path) -> None:
    with new_file(path) as partial:
        partial.symlink_to("/dev/full")
        partial.write_text("new")  # through the link: the device refuses every byte


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs the device that is always full")
def test_a_write_that_really_finds_no_space_is_said_and_leaves_the_previous_file(tmp_path: Path):
    (tmp_path / "out").write_text("old")
    with pytest.raises(FloraError, match="disk is full"):
        _write_without_space(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "old"
    assert _names(tmp_path) == ["out"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_place_that_cannot_be_written_is_said(tmp_path: Path, code: int):
    with pytest.raises(InputError, match=r"out cannot be written: .*Give another place"), new_file(tmp_path / "out"):
        raise OSError(code, os.strerror(code))


def test_a_place_below_a_file_is_said(tmp_path: Path):
    (tmp_path / "file").touch()
    for write in (new_file(tmp_path / "file" / "out"), new_folder(tmp_path / "file" / "out", marker=MARKER)):
        with pytest.raises(InputError, match="file"), write:
            pass


def test_a_file_in_the_place_of_a_folder_is_said(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out"), new_file(tmp_path / "out") as partial:
        partial.write_text("new")
    assert _names(tmp_path) == ["out"]


def test_a_new_folder_has_the_permissions_of_any_new_folder(tmp_path: Path):
    (tmp_path / "usual").mkdir()
    with new_folder(tmp_path / "model", marker=MARKER) as partial:
        _write(partial, "new")
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_document_survives_its_file(tmp_path: Path):
    recipe = Recipe(name="soup", steps=(1, 2))
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    assert json.loads((tmp_path / "recipe.json").read_text())["schema_version"] == 1


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"name": "soup", "tsep": 1}', "tsep"),
        ('{"steps": []}', "name"),
        ('{"name": "soup", "steps": [1, "two"]}', r"steps\.1"),
        ('{"schema_version": 2, "name": "soup"}', "schema_version"),
        ('{"name": ', "JSON"),
        ("", "JSON"),
        ("[]", "document"),
    ],
)
def test_a_bad_document_is_refused_with_the_file_and_the_key(tmp_path: Path, content: str, named: str):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(InputError, match=rf"recipe\.json is not a valid Recipe: .*{named}"):
        Recipe.load(tmp_path / "recipe.json")


def test_a_document_that_is_not_there_is_refused_by_name(tmp_path: Path):
    with pytest.raises(InputError, match=r"recipe\.json does not exist"):
        Recipe.load(tmp_path / "recipe.json")


def test_what_is_no_text_is_refused_by_name(tmp_path: Path):
    (tmp_path / "recipe.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match=r"recipe\.json cannot be read"):
        Recipe.load(tmp_path / "recipe.json")


def test_the_digest_is_sha256(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
