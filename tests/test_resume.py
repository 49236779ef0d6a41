"""A job goes on with the settings that it was begun with, and nothing that is not its own is touched."""

import json
import shutil
from pathlib import Path

import pytest

from flora.errors import InputError
from flora.resume import SETTINGS, Job, WorkFolder

GIVEN = {"budget": "macs=45%", "seed": 0, "sizes": (1, 2)}


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


def begin(out: Path, settings: dict, *, restart: bool = False) -> WorkFolder:
    work = WorkFolder.of(out)
    work.open(Job(settings=settings), restart=restart)
    return work


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "trained"


@pytest.fixture
def work(out: Path) -> WorkFolder:
    """The folder of a job that was stopped after it had written a file."""
    work = begin(out, GIVEN)
    work.file("state.pt").write_bytes(b"state")
    return work


def test_the_work_folder_lies_beside_the_output_which_is_not_made(out: Path):
    assert begin(out, GIVEN).path == out.with_name("trained.work")
    assert not out.exists()


def test_the_same_settings_find_what_was_kept(work: WorkFolder, out: Path):
    again = begin(out, dict(reversed(GIVEN.items())) | {"sizes": [1, 2]})
    assert again.file("state.pt").read_bytes() == b"state"


def test_settings_that_may_change_are_not_held_against_a_job_and_are_its_own_from_then_on(work, out: Path):
    job = Job(settings=GIVEN | {"seed": 1}, may_change=("seed", "rate"))
    work.open(job)
    assert work.file("state.pt").read_bytes() == b"state"
    assert job.is_in(work.path)
    assert not Job(settings=GIVEN).is_in(work.path)
    with pytest.raises(InputError, match=r'other settings \(budget: "macs=45%", now "macs=30%"\)'):
        work.open(Job(settings=GIVEN | {"budget": "macs=30%"}, may_change=("seed",)))
    with pytest.raises(InputError, match=r"other settings \(seed: 1, now 0\)"):
        begin(out, GIVEN)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 1}, r"\(seed: 0, now 1\)"),
        ({"sizes": [2, 1]}, r"\(sizes: \[1, 2\], now \[2, 1\]\)"),
        ({"budget": "macs=30%", "seed": 1}, r'\(budget: "macs=45%", now "macs=30%", seed: 0, now 1\)'),
        ({"added": True}, r"\(added: null, now true\)"),
    ],
)
def test_other_settings_are_refused_naming_what_differs_and_nothing_else(work, out, change: dict, difference: str):
    with pytest.raises(InputError, match=rf"trained\.work .*other settings {difference}.*--restart"):
        begin(out, GIVEN | change)
    assert work.file("state.pt").read_bytes() == b"state"


def test_a_setting_that_is_missing_is_named(work: WorkFolder, out: Path):
    with pytest.raises(InputError, match="seed: 0, now null"):
        begin(out, {key: value for key, value in GIVEN.items() if key != "seed"})


def test_a_long_setting_is_named_in_brief(out: Path):
    begin(out, {"space": "a" * 5000})
    with pytest.raises(InputError, match=r'space: "a+\.\.\., now "b+\.\.\.') as refused:
        begin(out, {"space": "b" * 5000})
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("content", [b"", b'{"seed": ', b"null", b"7", b'"text"', b'{"settings": 5}', b"\xff\xfe"])
def test_damaged_settings_are_refused_by_their_file(work: WorkFolder, out: Path, content: bytes):
    work.file(SETTINGS).write_bytes(content)
    with pytest.raises(InputError, match=rf"{SETTINGS} (is not a valid Job|cannot be read).*--restart"):
        begin(out, GIVEN)


@pytest.mark.parametrize("content", [None, b"null"], ids=["whole", "damaged"])
def test_restart_throws_away_what_was_kept_and_takes_the_new_settings(work: WorkFolder, out: Path, content):
    if content is not None:
        work.file(SETTINGS).write_bytes(content)
    begin(out, GIVEN | {"seed": 1}, restart=True)
    assert [path.name for path in work.path.iterdir()] == [SETTINGS]
    begin(out, GIVEN | {"seed": 1})


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_of_something_else_is_in_the_way_and_left_alone(out: Path, restart: bool):
    folder = out.with_name("trained.work")
    folder.mkdir()
    (folder / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"trained\.work is in the way"):
        begin(out, GIVEN, restart=restart)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("restart", [False, True])
def test_a_file_is_in_the_way_and_left_alone(out: Path, restart: bool):
    file = out.with_name("trained.work")
    file.write_text("mine")
    with pytest.raises(InputError, match=r"trained\.work is in the way"):
        begin(out, GIVEN, restart=restart)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("leftover", [None, f".{SETTINGS}.4711.partial"], ids=["empty", "killed while it was begun"])
def test_a_folder_that_no_job_has_begun_in_is_taken(out: Path, leftover: str | None):
    folder = out.with_name("trained.work")
    folder.mkdir()
    if leftover:
        (folder / leftover).write_text('{"seed"')
    begin(out, GIVEN)
    begin(out, GIVEN)


def test_remove_takes_the_whole_folder_and_not_the_output(work: WorkFolder, out: Path):
    out.mkdir()
    work.remove()
    assert not work.path.exists()
    assert out.is_dir()


@pytest.mark.parametrize(("place", "name", "stays"), [(Path, "rename", True), (shutil, "rmtree", False)])
def test_killed_while_it_is_removed_the_folder_is_whole_or_gone(work, out, monkeypatch, place, name, stays: bool):
    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            work.remove()
    assert work.path.exists() == work.file("state.pt").is_file() == work.file(SETTINGS).is_file() == stays
    begin(out, GIVEN | {"seed": 1}, restart=True)


def test_checking_writes_nothing(out: Path, work: WorkFolder):
    WorkFolder.of(out.with_name("other")).check(Job(settings=GIVEN))
    work.check(Job(settings=GIVEN | {"seed": 1}), restart=True)
    assert sorted(path.name for path in out.parent.iterdir()) == ["trained.work"]
    assert work.file("state.pt").is_file()


def test_an_output_is_a_jobs_where_it_holds_all_its_settings(out: Path):
    job = Job(settings=GIVEN)
    assert not job.is_in(out)
    job.save(out / SETTINGS)
    assert Job(settings=json.loads(json.dumps(GIVEN))).is_in(out)
    for other in (GIVEN | {"seed": 1}, GIVEN | {"more": None}, {"seed": 0}):
        assert not Job(settings=other).is_in(out)


def test_remove_leaves_a_folder_of_something_else(tmp_path: Path):
    (tmp_path / "thesis.tex").touch()
    WorkFolder(tmp_path).remove()
    assert (tmp_path / "thesis.tex").is_file()


def test_a_relative_output_means_one_folder_wherever_the_process_goes(out: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = begin(Path("trained"), GIVEN)
    monkeypatch.chdir("/")
    assert work.file(SETTINGS).is_file()
    assert work.path == out.with_name("trained.work")
