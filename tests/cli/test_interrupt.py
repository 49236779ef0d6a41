"""What stops a command in the middle, a signal or a full disk, leaves the previous artefact and nothing unfinished."""

import functools
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flora.artifact import sha256_of_file
from tests.flora_command import flora, leftovers, start_flora
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


def kill_in_second_write() -> None:
    """Let this process die, as the power fails, when half of its second training state is written."""
    write, written = torch.save, []

    def write_half(state: object, path: Path) -> None:
        write(state, path)
        written.append(path)
        if len(written) == 2:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = write_half


def test_a_training_killed_while_it_writes_its_state_goes_on_from_the_last_whole_one(worked, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    args = ("train", worked.filtered, "--data", worked.training, "--epochs", 3, "--batch-size", 16, "--threads", 1)
    assert flora(*args, "-o", whole).code == 0
    process = start_flora(*args, "-o", out, log=tmp_path / "log", before=kill_in_second_write)
    process.join(PATIENCE_S)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    work = tmp_path / "out.work"
    (half,) = leftovers(tmp_path)
    assert half.parent == work
    kept = torch.load(work / "state.pt", weights_only=True)
    assert (kept["step"], [line["epoch"] for line in kept["history"]]) == (3, [1])
    monkeypatch.setenv("FORCE_COLOR", "1")  # what is printed is printed as on a terminal, bars too
    monkeypatch.setenv("TERM", "xterm")
    resumed = flora(*args, "-o", out)
    assert resumed.code == 0, resumed
    assert contents(out) == contents(whole)
    assert re.findall(r"epoch \d of 3", resumed.err) == ["epoch 2 of 3", "epoch 3 of 3"]
    shares = [int(share) for share in re.findall(r"(\d+)%", resumed.err)]
    assert 100 / 3 < min(shares) <= max(shares) == 100, "the bar begins where the run does"
    assert leftovers(tmp_path) == []
    assert not work.exists()


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
    """One line of flora, the last one, and no traceback."""
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    assert "Traceback" not in log.read_text()
    assert [line for line in lines if line.startswith("flora: ")] == lines[-1:], log.read_text()
    for word in words:
        assert word in lines[-1]
