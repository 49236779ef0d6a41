"""Two processes on the CPU do what one does: the same files from filter and search, the same weights from training."""

import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import distributed

from flora.artifact import sha256_of_file
from flora.lowrank.checkpoint import (
    DENSE_WEIGHTS,
    SUPERNET_WEIGHTS,
    LoadedModel,
    ModelConfig,
    load_model_folder,
    load_supernet,
    save_model,
)
from flora.lowrank.weights import read_weights
from flora.pipeline.build import build
from flora.resume import Job, WorkFolder
from flora.training.processes import accelerator, processes
from tests.flora_command import PROCESSES, flora, leftovers, start_flora
from tests.samples import GREY, tiny_args, tiny_model
from tests.worked_example import FASHION, MODEL

PATIENCE_S = 240
SELECTION = f"{FASHION / 'selection.tar'},fold=1/3"
TRAINING = f"{FASHION / 'selection.tar'},except=1/3,limit=37"
SEARCH = ("--population", 7, "--parents", 3, "--mutants", 3, "--crossovers", 2, "--generations", 2, "--threads", 1)
# No momentum that divides by the gradient: where that is noise, AdamW would make a step of it.
TRAIN = ("--epochs", 2, "--batch-size", 12, "--accumulation", 2, "--sandwich", 1, "--optimizer", "sgd", "--lr", 0.05)
SEVERAL = ("--teacher", "dense", "--ema-decay", 0.9, "--select-data", SELECTION, "--threads", 1)


def torchrun(*args: object) -> subprocess.CompletedProcess:
    """`torchrun ... flora ARGS` in two processes, as it is typed."""
    programs = Path(sys.executable).parent
    command = [programs / "torchrun", "--standalone", "--no-python", "--nproc_per_node", 2, programs / "flora", *args]
    return subprocess.run(
        list(map(str, command)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended, and all that it printed."""

    code: int | None
    log: str


def set_environment(values: dict[str, str]) -> None:
    os.environ.update(values)


def places() -> list[dict[str, str]]:
    """What torchrun tells each of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def in_two(folder: Path, *args: object) -> list[Ended]:
    """`flora ARGS` in two processes with what torchrun tells them, and nothing that ends one when the other fails."""
    logs = [folder / f"log-{rank}" for rank in range(2)]
    started = [
        start_flora(*args, log=log, before=functools.partial(set_environment, place))
        for log, place in zip(logs, places(), strict=True)
    ]
    for process in started:
        process.join(PATIENCE_S)
        if process.is_alive():
            process.kill()
    return [Ended(code=process.exitcode, log=log.read_text()) for process, log in zip(started, logs, strict=True)]


def contents(folder: Path) -> dict[str, str]:
    """All files but a search's figures, in which plotly writes names of its own."""
    return {path.name: sha256_of_file(path) for path in folder.iterdir() if path.suffix != ".html"}


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The supernet of a model of three blocks, which two processes cannot share evenly."""
    config = ModelConfig(model=MODEL, args=tiny_args(depth=3), preprocessing=GREY)
    folder = tmp_path_factory.mktemp("distributed") / "supernet"
    build(LoadedModel(module=tiny_model(depth=3), config=config), folder, method="svd", space="ratios=0.2,0.4,0.6,1")
    return folder


@pytest.fixture(scope="module")
def filtered(supernet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, filtered by one process."""
    out = tmp_path_factory.mktemp("distributed") / "filtered"
    assert flora("filter", supernet, "--select-data", SELECTION, "-o", out, "--threads", 1).code == 0
    return out


def write_patience(place: dict[str, str], begin: Callable[[], object], file: Path) -> None:
    """In a process of the two: how long the group that `begin` has made lets one wait for the others."""
    set_environment(place)
    begin()
    backend = distributed.group.WORLD._get_backend(torch.device("cpu"))
    file.write_text(f"{distributed.get_backend()} {backend.options._timeout.total_seconds()}")
    distributed.barrier()  # the other one would find nobody to meet if this one ended now


@pytest.mark.parametrize(
    "begin", [processes, functools.partial(accelerator, torch.device("cpu"), "no")], ids=["processes", "accelerator"]
)
def test_processes_wait_for_days_while_one_of_them_works(begin, tmp_path):
    files = [tmp_path / name for name in "ab"]
    started = [
        PROCESSES.Process(target=write_patience, args=(place, begin, file))
        for place, file in zip(places(), files, strict=True)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE_S)
    for file in files:
        backend, seconds = file.read_text().split()
        assert backend == "gloo"
        assert float(seconds) == pytest.approx(7 * 24 * 3600)


def test_filter_gives_the_files_of_one_process_for_blocks_that_do_not_divide(supernet, filtered, tmp_path):
    ended = in_two(tmp_path, "filter", supernet, "--select-data", SELECTION, "-o", tmp_path / "out", "--threads", 1)
    assert [one.code for one in ended] == [0, 0], ended
    assert len(load_supernet(filtered).config.space.blocks) == 3
    assert contents(tmp_path / "out") == contents(filtered)
    assert ended[1].log == "", "one process prints"
    assert "blocks.2" in ended[0].log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log-0", "log-1", "out"]


def test_search_gives_the_files_of_one_process_for_candidates_that_do_not_divide(filtered, tmp_path):
    budgets = ("--budget", "macs=70%", "--budget", "macs=55%")
    args = ("search", filtered, "--select-data", SELECTION, *budgets, *SEARCH, "-o")
    one = flora(*args, tmp_path / "one")
    assert one.code == 0, one
    ended = in_two(tmp_path, *args, tmp_path / "two")
    assert [process.code for process in ended] == [0, 0], ended
    found = contents(tmp_path / "two")
    ranks = {"ranks-macs-70pct.json", "ranks-macs-55pct.json"}
    assert found.keys() == {"pareto.json", "history.json", "settings.json", *ranks}
    assert found == contents(tmp_path / "one")
    assert ended[1].log == "", "one process prints"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log-0", "log-1", "one", "two"]


def test_train_gives_nearly_the_weights_of_one_process(filtered, tmp_path):
    """Under torchrun, as it is typed; the figures after each epoch are those of one process, too."""
    args = ("train", filtered, "--data", TRAINING, *TRAIN, *SEVERAL, "-o")
    one = flora(*args, tmp_path / "one")
    assert one.code == 0, one
    two = torchrun(*args, tmp_path / "two")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("Wrote the model") == 1, "one process prints"
    assert [two.stderr.count(f"epoch {epoch} of 2, loss ") for epoch in (1, 2)] == [1, 1], two.stderr
    start, alone, together = (
        read_weights(f / SUPERNET_WEIGHTS) for f in (filtered, tmp_path / "one", tmp_path / "two")
    )
    for name in start:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-4, atol=1e-6)
    moved = max((alone[name] - start[name]).abs().max().item() for name in start)
    assert moved > 1e-3, "a tolerance says something of weights that moved further"
    assert sha256_of_file(tmp_path / "two" / DENSE_WEIGHTS) == sha256_of_file(filtered / DENSE_WEIGHTS)
    courses = [load_supernet(tmp_path / name).config.training[0].history for name in ("one", "two")]
    for mine, other in zip(*courses, strict=True):
        assert mine == pytest.approx(other, abs=1.1), "an image of a hundred may fall to the other side"
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert leftovers(tmp_path) == []


def test_a_command_that_cannot_be_done_ends_every_process_with_its_message(filtered, tmp_path):
    args = ("search", filtered, "--select-data", SELECTION, "--budget", "macs=9%", "-o", tmp_path / "out")
    for one in in_two(tmp_path, *args):
        assert one.code == 1, one
        assert "flora: The budget macs=9%" in one.log
        assert "below the smallest subnet; the space reaches from" in one.log
        assert "Traceback" not in one.log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log-0", "log-1"]


def test_what_is_finished_is_finished_for_every_process(supernet, filtered, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in filtered.iterdir()}
    ended = in_two(tmp_path, "filter", supernet, "--select-data", SELECTION, "-o", filtered, "--threads", 1)
    assert [one.code for one in ended] == [0, 0], ended
    assert ended[0].log.count("is finished; there is nothing to do") == 1
    assert ended[1].log == "", "one process prints"
    assert {path.name: path.stat().st_mtime_ns for path in filtered.iterdir()} == before


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed") / "dense"
    save_model(folder, tiny_model(), ModelConfig(model=MODEL, args=tiny_args(), preprocessing=GREY))
    return folder


COMPRESS = (
    *("--method", "supernet", "--budget", "macs=60%", "--layers", "qkv,fc1,fc2", "--space", "ratios=0.2,0.5,1"),
    *(
        "--data",
        TRAINING,
        "--select-data",
        f"{SELECTION},limit=30",
        "--calib-data",
        f"{FASHION / 'calibration.tar'},limit=32",
    ),
    *("--eval-data", f"{FASHION / 'test.tar'},limit=20", "--population", 4, "--generations", 1, "--max-drop", 100),
    *("--epochs", 1, "--batch-size", 12, "--threads", 1),
)


def test_compress_leads_two_processes_to_one_bundle_and_does_what_has_changed(dense, tmp_path):
    out = tmp_path / "bundle"
    ended = in_two(tmp_path, "compress", dense, *COMPRESS, "-o", out)
    assert [one.code for one in ended] == [0, 0], ended
    assert ended[1].log == "", "one process prints"
    trained = out.with_name("bundle.work") / "trained"
    before = contents(trained), (trained / SUPERNET_WEIGHTS).stat().st_mtime_ns
    again = in_two(tmp_path, "compress", dense, *COMPRESS, "--finetune-epochs", 0, "-o", out)
    assert [one.code for one in again] == [0, 0], again
    assert (contents(trained), (trained / SUPERNET_WEIGHTS).stat().st_mtime_ns) == before
    assert len(load_model_folder(out / "model").config.training) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.work", "log-0", "log-1"]
    assert leftovers(tmp_path) == []


def test_an_unfinished_job_of_other_settings_is_refused_by_every_process(filtered, tmp_path):
    WorkFolder.of(tmp_path / "out").open(Job(settings={"budgets": ["macs=50%"]}))
    ended = in_two(
        *(tmp_path, "search", filtered, "--select-data", SELECTION, "--budget", "macs=70%"),
        *(*SEARCH, "-o", tmp_path / "out"),
    )
    for one in ended:
        assert one.code == 1, one
        assert "flora: " in one.log
        assert "holds an unfinished job with other settings" in one.log
        assert "Traceback" not in one.log
    assert not (tmp_path / "out").exists()
