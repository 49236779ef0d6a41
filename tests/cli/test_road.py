"""The paper's road on a tiny model by its commands: filter, train, search and materialize, or compress at once."""

import contextlib
import io
import json
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from flora.artifact import sha256_of_file
from flora.cli.output import StepProgress
from flora.lowrank.checkpoint import load_model_folder, load_supernet
from flora.ranks.latency import LatencyModel
from flora.resume import Job, WorkFolder
from tests.flora_command import Outcome, assert_refused, flora, leftovers, start_flora
from tests.pipeline.tables import latency_table
from tests.worked_example import EPOCHS, GENERATIONS, WorkedExample

PATIENCE_S = 120


def table_rows(out: str) -> list[list[str]]:
    """The cells of every row of the tables on stdout, their headings left out."""
    rows = (line.strip("│").split("│") for line in out.splitlines() if line.startswith("│"))
    return [[cell.strip() for cell in row] for row in rows]


def next_command(outcome: Outcome, **places: object) -> list[str]:
    """The words of the command that was named next, with something for each placeholder."""
    line = next(line for line in outcome.out.splitlines() if line.startswith("Next: flora "))
    words = line.removeprefix("Next: flora ").split()
    return [str(places.get(word, word)) for word in words]


def said_as_json(outcome: Outcome) -> dict:
    """The one document on stdout; nothing is said on stderr."""
    assert (outcome.code, outcome.err.strip()) == (0, ""), outcome
    return json.loads(outcome.out)


def lines_of(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.strip()]


# Tables


def test_filter_prints_a_row_for_each_block_and_the_space_before_and_after(worked):
    filtered = load_supernet(worked.filtered).config.space
    rows = table_rows(worked.outcomes["filter"].out)
    assert [row[0] for row in rows] == ["blocks.0", "blocks.1", "before", "after"]
    assert [int(row[3]) for row in rows[:2]] == [len(candidates) for candidates in filtered.candidates]
    assert rows[2][2:4] == rows[3][2:4], "the reachable range stays"
    assert float(rows[3][1]) < float(rows[2][1])
    assert f"Wrote the supernet {worked.filtered}" in worked.outcomes["filter"].out


@pytest.mark.parametrize("command", ["build", "filter", "train", "search"])
def test_a_finished_command_says_so_and_prints_what_it_found(worked, command):
    out = {"build": worked.supernet, "filter": worked.filtered, "train": worked.trained, "search": worked.found}[
        command
    ]
    before = times(out)
    again = flora(*worked.typed[command])
    assert (again.code, again.out) == (0, worked.outcomes[command].out)
    assert again.message == f"flora: {out} is finished; there is nothing to do. --restart does it again."
    assert times(out) == before


def test_a_finished_command_is_done_again_with_restart(worked, tmp_path):
    args = ("build", worked.dense, "--method", "svd", "-o", tmp_path / "out")
    first = flora(*args)
    before = times(tmp_path / "out")
    again = flora(*args, "--restart")
    assert (again.code, again.out, again.err.strip()) == (0, first.out, "")
    assert all(before[name] != time for name, time in times(tmp_path / "out").items())


def test_train_prints_a_row_for_each_epoch(worked):
    (record,) = load_supernet(worked.trained).config.training
    rows = table_rows(worked.outcomes["train"].out)
    assert [[float(cell) for cell in row] for row in rows] == [list(line.values()) for line in record.history]
    assert f"Wrote the model {worked.trained}" in worked.outcomes["train"].out


def test_search_by_latency_says_what_is_fastest_and_what_it_predicts(worked, tmp_path):
    table = latency_table(worked, tmp_path / "latency.json")
    command = ("search", worked.trained, "--select-data", worked.selection, *GENERATIONS, "-o", tmp_path / "found")
    budgets = ("--budget", "latency=0.85x", "--budget", "macs=70%", "--latency-table", tmp_path / "latency.json")
    outcome = flora(*command, *budgets)
    assert outcome.code == 0, outcome
    rows = {row[0]: row for row in table_rows(outcome.out)}
    dense_ms = LatencyModel(table, batch=8).dense_ms
    assert float(rows["fastest at batch 8"][5]) <= float(rows["smallest"][5]) <= dense_ms
    assert float(rows["latency=0.85x"][4]) <= 0.85 * dense_ms * 1.005
    assert rows["macs=70%"][4] == "-"
    refused = flora(*command, "--budget", "latency=0.85x")
    assert refused.code == 2, refused
    assert "needs --latency-table FILE" in refused.message


def test_search_prints_what_can_be_reached_and_a_row_for_each_budget(worked):
    found = worked.found
    out = worked.outcomes["search"].out
    rows = table_rows(out)
    assert [row[0] for row in rows] == ["smallest", "middle", "largest", *worked.budgets]
    assert rows[2][2] == "100.0%"
    for row, budget in zip(rows[3:], worked.budgets, strict=True):
        config = json.loads((found / row[-1]).read_text())
        assert config["budget"] == budget
        assert row[4] == f"{config['score']:.5g}"
        assert float(row[2].rstrip("%")) <= float(budget.strip("macs=%"))
    assert out.index("Within reach") < out.index("score (loss)")
    assert f"Wrote the search {found}" in out


def test_filter_says_each_block_and_search_each_generation_on_stderr(worked):
    assert worked.filtered.is_dir()
    assert lines_of(worked.outcomes["filter"].err) == ["scoring blocks: blocks.0", "scoring blocks: blocks.1"]
    assert worked.found.is_dir()
    assert lines_of(worked.outcomes["search"].err) == [
        f"searching: {budget}, generation {generation} of 2" for budget in worked.budgets for generation in range(3)
    ]


def test_train_says_each_epoch_on_stderr(worked):
    (record,) = load_supernet(worked.trained).config.training
    lines = lines_of(worked.outcomes["train"].err)
    for said, figures in zip(lines, record.history, strict=True):
        told, _, seconds = said.rpartition(", ")
        accuracies = [f"{name} {figures[name]:.2f} %" for name in ("top1_smallest", "top1_largest")]
        assert told == ", ".join([f"epoch {figures['epoch']} of 2", f"loss {figures['loss']:.4f}", *accuracies])
        assert float(seconds.removesuffix(" s")) > 0


def test_each_step_names_the_next_one_and_it_runs(worked, tmp_path):
    """From the filter to the compact model by the printed commands alone."""
    filtered, trained, compact = (tmp_path / name for name in ("filtered", "trained", "compact"))
    step = flora("filter", worked.supernet, "--select-data", worked.selection, "-o", filtered)
    quick = ("--epochs", 1, "--batch-size", 48, "--threads", 1)
    step = flora(*next_command(step, IMAGES=worked.training, **{f"{filtered}-trained": trained}), *quick)
    assert step.code == 0, step
    words = next_command(step, IMAGES=worked.selection)
    step = flora(*words, "--population", 4, "--parents", 2, "--mutants", 2, "--crossovers", 2, "--generations", 1)
    assert step.code == 0, step
    step = flora(*next_command(step, **{f"{trained}-search-compact": compact}))
    assert step.code == 0, step
    config = load_model_folder(compact).config
    cost = load_supernet(trained).config.cost
    assert cost.macs(config.ranks) <= 0.5 * cost.dense_macs
    assert set(config.image_sets) == {"calibration", "selection", "training"}
    assert f"Next: flora export {compact} " in step.out
    assert leftovers(tmp_path) == []


def test_a_compact_model_is_fine_tuned_by_the_same_command_and_exported_next(worked, tmp_path):
    tuned = tmp_path / "tuned"
    outcome = flora("train", worked.compact, "--data", worked.training, "-o", tuned, *EPOCHS)
    assert [row[0] for row in table_rows(outcome.out)] == ["1", "2"]
    assert next_command(outcome)[:2] == ["export", str(tuned)]


# JSON


def test_filter_says_what_it_kept_as_json(worked, tmp_path):
    out = tmp_path / "out"
    said = said_as_json(
        flora("filter", worked.supernet, "--select-data", worked.selection, "-o", out, "--json", "--threads", 1)
    )
    assert sha256_of_file(out / "filter.json") == sha256_of_file(worked.filtered / "filter.json")
    before, after = (load_supernet(folder).config for folder in (worked.supernet, out))
    assert (int(said["size_before"]), int(said["size"])) == (before.space.size, after.space.size)
    smallest, largest = (before.cost.macs(ranks) for ranks in (before.space.smallest(), before.space.largest()))
    assert said["reachable_macs_before"] == said["reachable_macs"] == [smallest, largest]
    assert smallest < said["mean_macs"] < largest
    assert (said["supernet"], said["image_forwards"] > 0) == (str(out), True)


def test_train_says_its_history_as_json(worked, tmp_path):
    out = tmp_path / "out"
    said = said_as_json(flora("train", worked.filtered, "--data", worked.training, "-o", out, "--json", *EPOCHS))
    (record,) = load_supernet(out).config.training
    assert said == {"model": str(out), "history": list(record.history)}


def test_search_says_what_it_found_as_json(worked, tmp_path):
    out = tmp_path / "out"
    budgets = [text for budget in worked.budgets for text in ("--budget", budget)]
    said = said_as_json(
        flora("search", worked.trained, "--select-data", worked.selection, *budgets, "-o", out, "--json", *GENERATIONS)
    )
    assert list(said["budgets"]) == list(worked.budgets)
    for entry in said["budgets"].values():
        config = json.loads((out / entry["file"]).read_text())
        assert {key: config[key] for key in ("macs", "params", "score")} == {
            key: entry[key] for key in ("macs", "params", "score")
        }
        assert (out / entry["file"]).read_bytes() == (worked.found / entry["file"]).read_bytes()


@pytest.mark.parametrize(
    ("option", "value", "population"),
    [("--population", 6, 6), ("--parents", 4, 50), ("--mutants", 40, 50), ("--crossovers", 0, 50)],
)
def test_one_size_of_a_search_is_enough_and_the_others_follow(worked, tmp_path, option, value, population):
    few = ("--select-data", f"{worked.selection},limit=9", "--budget", "macs=70%", "--generations", 1, "--threads", 1)
    outcome = flora("search", worked.trained, *few, option, value, "-o", tmp_path / "out")
    assert outcome.code == 0, outcome
    generations = json.loads((tmp_path / "out" / "history.json").read_text())["generations"]
    assert [generation["evaluated"] for generation in generations] == [population, 2 * population]


# Refused at once


def test_an_infeasible_budget_is_refused_with_the_reachable_range(worked, tmp_path):
    for budget in ("macs=20%", "macs=1M", "params=1K"):
        outcome = flora(
            *("search", worked.trained, "--select-data", worked.selection, "--budget", "macs=70%", "--budget", budget),
            *("-o", tmp_path / "out"),
        )
        assert_refused(outcome, budget, "below the smallest subnet", "the space reaches from", "(100.00%)")
        assert list(tmp_path.iterdir()) == []


REFUSED = [
    (("search", "--budget", "macks=50%"), ("'macks=50%' is no budget", "Did you mean macs?")),
    (("search", "--budget", "parms=12M"), ("Did you mean params?",)),
    (("search", "--budget", "50%"), ("'50%' is no budget here; write macs=50%",)),
    (("search", "--budget", "macs=half"), ("'macs=half' is no MACs budget",)),
    (("search", "--budget", "macs=0%"), ("above 0 and at most at 100%",)),
    (("search", "--budget", "macs=60%", "--budget", "macs=60%"), ("A budget is given twice",)),
    (("search", "--budget", "macs=60%", "--population", "0"), ("population and parents are at least 1",)),
    (("search", "--budget", "macs=60%", "--parents", "51"), ("parents (51)", "population (50)", "--population")),
    (
        ("search", "--budget", "macs=60%", "--population", "8", "--mutants", "5", "--crossovers", "4"),
        ("mutants + crossovers (5 + 4)", "population (8); lower them or raise --population"),
    ),
    (("search", "--budget", "macs=60%", "--mutants", "51"), ("(51 + 0)", "population (50)")),
    (("search", "--budget", "macs=60%", "--window", "1"), ("window lies in [0, 1)",)),
    (("filter", "--share", "0"), ("above 0 and at most at 1, got 0",)),
    (("filter", "--share", "30"), ("above 0 and at most at 1, got 30",)),
    (
        ("filter", "--scorer", "local", "--data", "x", "--preset", "deit"),
        ("no preset 'deit'", "Did you mean deit-s or deit-b?"),
    ),
    (("train", "--preset", "diet-s"), ("no preset 'diet-s'", "default, deit-s, deit-b, local", "Did you mean")),
    (("train", "--epochs", "0"), ("epochs",)),
    (("train", "--preset", "deit-s", "--epochs", "3"), ("warm-up of 5 epochs", "run of 3", "add --warmup-epochs")),
    (("train", "--lr", "0"), ("learning_rate",)),
    (("train", "--batch-size", "16", "--optimizer", "adamm"), ("adamm",)),
    (("train", "--batch-size", "16", "--schedule", "cosin"), ("cosin",)),
    (("train", "--teacher", "none", "--teacher-cache", "cache"), ("leave out the other teacher options",)),
    (("train", "--precision", "fp16"), ("fp16 needs a GPU",)),
]


@pytest.mark.parametrize(("args", "words"), REFUSED, ids=[" ".join(args) for args, _ in REFUSED])
def test_what_no_step_can_do_is_refused_and_nothing_is_written(worked, tmp_path, monkeypatch, args, words):
    command, *options = args
    images = ("--data", worked.training) if command == "train" else ("--select-data", worked.selection)
    monkeypatch.chdir(tmp_path)
    assert_refused(flora(command, worked.trained, *images, *options, "-o", "out"), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["filter", "train", "search"])
def test_what_another_command_left_unfinished_is_kept_until_restart_is_said(worked, tmp_path, command):
    out = tmp_path / "out"
    WorkFolder.of(out).open(Job(settings={"a setting": 5}))
    args = {
        "filter": ("filter", worked.supernet, "--select-data", f"{worked.selection},limit=9"),
        "train": ("train", worked.compact, "--data", worked.training, *EPOCHS),
        "search": ("search", worked.supernet, "--select-data", worked.selection, "--budget", "macs=70%", *GENERATIONS),
    }[command]
    assert_refused(
        flora(*args, "-o", out, "--json"), "out.work holds an unfinished job", "a setting: 5, now null", "--restart"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    said_as_json(flora(*args, "-o", out, "--json", "--restart"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# compress


def arguments(worked: WorkedExample, out: Path) -> tuple[object, ...]:
    return (
        *("compress", worked.dense, "--method", "supernet", "--budget", "macs=60%", "--data", worked.training),
        *("--select-data", worked.selection, "--calib-data", worked.calibration, "--eval-data", worked.images),
        *("--layers", "qkv,fc1,fc2", "--space", "ratios=0.15,0.3,0.5,1", "--population", 6, "--generations", 1),
        *("--epochs", 25, "--batch-size", 24, "--lr", 1e-4, "--threads", 1, "-o", out),
    )


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A compression stopped in the training of its supernet, and typed again."""

    out: Path
    stopped: int
    log: str
    left: dict[str, int]
    outcome: Outcome
    written: dict[str, int]

    @property
    def work(self) -> Path:
        return self.out.with_name(f"{self.out.name}.work")


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def compressed(worked: WorkedExample, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    root = tmp_path_factory.mktemp("compressed")
    out, work, log = root / "bundle", root / "bundle.work", root / "log"
    process = start_flora(*arguments(worked, out), "--max-drop", 0, log=log)
    deadline = time.monotonic() + PATIENCE_S
    while not (work / "trained.work" / "state.pt").is_file():
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline, "the training did not begin"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    process.join(PATIENCE_S)
    left = times(work)
    outcome = flora(*arguments(worked, out), "--max-drop", 0)
    return Compressed(
        out=out, stopped=process.exitcode, log=log.read_text(), left=left, outcome=outcome, written=times(work)
    )


def test_compress_stopped_by_a_signal_says_so_and_keeps_what_was_finished(compressed):
    assert compressed.stopped == 130, compressed.log
    assert "flora: interrupted; what was not finished was not written." in compressed.log
    assert "Traceback" not in compressed.log
    kept = {name.partition("/")[0] for name in compressed.left}
    assert kept == {"supernet", "filtered", "trained.work"}


def test_compress_says_what_is_within_reach_and_then_each_step_block_epoch_and_generation(worked, compressed):
    before, after = (load_supernet(compressed.work / name).config for name in ("supernet", "filtered"))
    reach = []
    for name in ("smallest", "middle", "largest"):
        reach.append(next(line for line in lines_of(compressed.log) if line.startswith(f"{name} subnet: ")))
    smallest = before.space.smallest()
    macs, params = before.cost.macs(smallest), before.cost.params(smallest)
    assert reach[0] == (
        f"smallest subnet: {macs / 1e6:.2f} M MACs ({macs / before.cost.dense_macs:.1%} of dense), "
        f"{params / 1e6:.2f} M parameters ({params / before.cost.dense_params:.1%})"
    )
    spaces = [
        f"space {name} filtering: {float(config.space.size):.3g} configs from {macs / 1e6:.2f} M to "
        for name, config in (("before", before), ("after", after))
    ]
    first, second = lines_of(compressed.log), lines_of(compressed.outcome.err)
    assert first[:3] == second[:3] == reach
    assert first[4:8] == ["factorizing", "filtering candidates", *(f"filtering candidates: blocks.{i}" for i in (0, 1))]
    assert [first[3].startswith(spaces[0]), first[8].startswith(spaces[1])] == [True, True]
    assert first[9] == "training the supernet"
    assert first[10].startswith("training the supernet: epoch 1 of 25, loss ")
    assert second[3:5] == [first[3], first[8]], "what is finished is not said again"
    rest = [line.partition(", loss ")[0] for line in second[5:]]
    at = rest.index("searching")
    assert rest[0] == "training the supernet"
    assert rest[at - 1 : at + 5] == [
        *("training the supernet: epoch 25 of 25", "searching"),
        *("searching: generation 0 of 1", "searching: generation 1 of 1"),
        *("materializing", "fine-tuning"),
    ]
    tuned = [f"fine-tuning: epoch {epoch} of 25" for epoch in range(1, 26)]
    assert rest[at + 5 : at + 31] == [*tuned, "writing the compact model"]
    assert [rest.count("verifying every step"), rest.count("measuring latency")] == [1, 1]


def test_on_a_terminal_a_line_changes_and_epochs_stay(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    err = io.StringIO()
    with contextlib.redirect_stderr(err), StepProgress() as shown:
        shown.on_step("training")
        shown.on_step("training: step 1 of 2")
        shown.on_line("training: epoch 1 of 1")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err.getvalue())
    lines = [line.strip() for line in re.split(r"[\r\n]+", plain)]
    assert "training: epoch 1 of 1" in lines
    assert "training" not in lines
    assert any(line.endswith("training: step 1 of 2") for line in lines)


def test_the_same_command_goes_on_where_compress_was_stopped(compressed):
    finished = {name for name in compressed.left if name.startswith(("supernet/", "filtered/"))}
    assert len(finished) == 9
    assert {name: compressed.written[name] for name in finished} == {name: compressed.left[name] for name in finished}
    assert len(load_supernet(compressed.work / "trained").config.training[0].history) == 25
    assert not (compressed.work / "trained.work").exists()
    assert leftovers(compressed.out.parent) == []


def test_the_subnet_trains_as_long_as_the_supernet_did_unless_asked_otherwise(compressed):
    model = load_model_folder(compressed.out / "model")
    assert [len(record.history) for record in model.config.training] == [25, 25]


def test_compress_exits_3_when_its_gate_fails_and_keeps_the_labelled_bundle(worked, compressed):
    outcome = compressed.outcome
    assert outcome.code == 3, outcome
    assert "The gate failed at factorized, torch" in outcome.message
    manifest = json.loads((compressed.out / "manifest.json").read_text())
    assert {entry["name"]: entry["status"] for entry in manifest["artifacts"]} == {
        "dense, ONNX Runtime": "verified",
        "factorized, ONNX Runtime": "failed",
    }
    assert manifest["recommended"] == "dense, ONNX Runtime"


def test_compress_prints_the_bundle_where_its_steps_lie_and_the_next_command(worked, compressed):
    out = compressed.outcome.out
    for words in ("dense, torch", "factorized, ONNX Runtime, batch 8", "FAILED", "Recommended: onnx/"):
        assert words in out
    assert f"Wrote the bundle {compressed.out} (its steps lie in {compressed.work})" in out
    assert f"Next: flora verify {compressed.out} --data {worked.images}" in out


def test_a_second_compress_with_another_limit_does_no_finished_step_again(worked, compressed):
    """A gate may be set anew when all is done; what `flora verify` says of the bundle is what compress said."""
    said = said_as_json(flora(*arguments(worked, compressed.out), "--max-drop", 100, "--json"))
    assert times(compressed.work) == compressed.written
    assert all(stage["passed"] for stage in said["verification"]["stages"])
    assert said["artifacts"][1]["macs"] <= 0.6 * said["artifacts"][0]["macs"]
    assert said["image_sets"].keys() == {"calibration", "selection", "training", "evaluation"}
    assert said["command"][:2] == ["flora", "compress"]
    checked = said_as_json(flora("verify", compressed.out, "--data", worked.images, "--threads", 1, "--json"))
    assert checked["passed"]
    assert checked["report"]["stages"][-1]["top1"] == said["verification"]["stages"][-1]["top1"]


def test_with_a_later_option_compress_keeps_the_trained_supernet(worked, compressed, tmp_path):
    """And a checkpoint of a teacher that is none is refused before anything is done."""
    kept = {name: time for name, time in times(compressed.work).items() if name.startswith(("filtered/", "trained/"))}
    outcome = flora(*arguments(worked, compressed.out), "--finetune-epochs", 0, "--fitness", "distance")
    assert outcome.code in (0, 3), outcome
    assert {name: times(compressed.work)[name] for name in kept} == kept
    assert len(load_model_folder(compressed.out / "model").config.training) == 1
    assert_refused(
        flora(*arguments(worked, tmp_path / "out"), "--teacher-checkpoint", "file"), "belongs to a timm name"
    )


def test_compress_refuses_evaluation_images_that_it_would_train_on(worked, tmp_path):
    args = list(arguments(worked, tmp_path / "out"))
    args[args.index("--eval-data") + 1] = worked.training
    assert_refused(flora(*args), "48 images of the evaluation set", "also in the training set", "Use separate images")
    assert list(tmp_path.iterdir()) == []


def test_compress_refuses_an_infeasible_budget_before_anything_is_spent(worked, tmp_path):
    args = list(arguments(worked, tmp_path / "out"))
    args[args.index("--budget") + 1] = "macs=9%"
    assert_refused(flora(*args), "macs=9%", "below the smallest subnet", "the space reaches from")
    assert list(tmp_path.iterdir()) == []
