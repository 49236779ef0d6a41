"""What stops a command in the middle, a signal or a full disk, leaves the previous artefact and nothing unfinished."""

import functools
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flora.artifact import sha256_of_file
from tests.flora_command import leftovers, start_flora
from tests.worked_example import QUICK

PATIENCE_S = 120


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("previous", [True, False], ids=["over a bundle", "anew"])
def test_an_interrupted_export_leaves_what_was_there(worked, tmp_path, number, previous):
    out = tmp_path / "bundle"
    if previous:
        shutil.copytree(worked.bundle, out)
    before = contents(out)
    process = start_flora(
        *("export", worked.compact, "--eval-data", worked.images, "-o", out, *QUICK), log=tmp_path / "log"
    )
    deadline = time.monotonic() + PATIENCE_S
    while not any(tmp_path.glob(".bundle.*.partial/model/*")):
        assert process.is_alive(), (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, "the export did not begin"
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(PATIENCE_S)
    assert process.exitcode == 130, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert "flora: interrupted; what was not finished was not written." in log
    assert "Traceback" not in log
    assert leftovers(tmp_path) == []
    assert out.exists() == previous
    assert contents(out) == before


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 400 KiB: room for the compact model, not for a supernet or a bundle."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "flora-test", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no file system can be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_while_building_is_one_message(worked, small_disk, tmp_path):
    process = start_flora("build", worked.dense, "--method", "svd", "-o", small_disk / "out", log=tmp_path / "log")
    process.join(PATIENCE_S)
    assert_said(tmp_path / "log", "The disk is full")
    assert process.exitcode == 1
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_while_exporting_is_one_message(worked, small_disk, tmp_path):
    process = start_flora(
        *("export", worked.compact, "--eval-data", worked.images, "-o", small_disk / "out", *QUICK),
        log=tmp_path / "log",
    )
    process.join(PATIENCE_S)
    assert_said(tmp_path / "log", "The disk is full")
    assert process.exitcode == 1
    assert list(small_disk.iterdir()) == []


def test_a_limit_on_file_size_is_one_message(worked, tmp_path):
    """As a quota does: the system refuses to let a file grow."""
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (50_000, 50_000))
    out = tmp_path / "out"
    process = start_flora("build", worked.dense, "--method", "svd", "-o", out, log=tmp_path / "log", before=limit)
    process.join(PATIENCE_S)
    assert_said(tmp_path / "log", "The disk is full")
    assert process.exitcode == 1
    assert not out.exists()
    assert leftovers(tmp_path) == []


def assert_said(log: Path, *words: str) -> None:
    """One line of flora, and no traceback."""
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    assert len(lines) == 1, log.read_text()
    assert lines[0].startswith("flora: ")
    for word in words:
        assert word in lines[0]
