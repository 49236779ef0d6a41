"""Help of every command, lean start, and what is refused before anything is loaded."""

import json
import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from flora.cli import COMMANDS
from flora.cli import flora as group
from flora.ranks.evolution import SearchSettings
from flora.training.settings import AUGMENTATIONS, PRESETS
from tests.flora_command import flora

COMMAND_NAMES = list(COMMANDS)


def options_of(name: str) -> list[click.Option]:
    command = group.get_command(click.Context(group), name)
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


@pytest.mark.parametrize("name", COMMAND_NAMES)
def test_help_names_every_option_and_says_what_it_does(name):
    outcome = flora(name, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    for option in options_of(name):
        assert max(option.opts, key=len) in outcome.out
        assert option.help or option.name == "batch_size", f"--{option.name} has no help text"


def help_of(name: str) -> dict[str, str]:
    """The help of each option by its name, as it is printed on a wide terminal."""
    shown = CliRunner().invoke(group, [name, "--help"], terminal_width=400, max_content_width=400).output
    found = re.findall(r"^  (?:-\w, )?--([\w-]+)(.*(?:\n {3,}.*)*)", shown, re.MULTILINE)
    return {option: text.strip() for option, text in found}


@pytest.mark.parametrize(("name", "preset"), [("train", "default"), ("compress", "default"), ("filter", "local")])
def test_help_names_what_the_preset_says_of_each_setting(name, preset):
    renamed = {"learning_rate": "lr", "min_learning_rate": "min-lr", "warmup_learning_rate": "warmup-lr"}
    shown = help_of(name)
    assert f"the defaults below are those of '{preset}'" in shown["preset"]
    for setting, value in PRESETS[preset]:
        text = shown[renamed.get(setting, setting.replace("_", "-"))]
        default = text.rpartition("(default: ")[2].removesuffix(")")
        if setting == "augmentation":
            assert AUGMENTATIONS[default] == value
        elif isinstance(value, int | float):
            assert float(default) == value, setting
        else:
            assert default == (value or "none"), setting


@pytest.mark.parametrize("name", ["search", "compress"])
def test_help_names_the_size_of_a_search(name):
    shown = help_of(name)
    assert f"[default: {SearchSettings.population}]" in shown["population"]
    assert f"[default: {SearchSettings.generations}]" in shown["generations"]


@pytest.mark.parametrize("name", COMMAND_NAMES)
def test_every_command_has_json_output(name):
    assert any("--json" in option.opts for option in options_of(name))


def test_the_help_of_flora_lists_the_commands_and_the_exit_codes():
    outcome = flora("--help")
    assert outcome.code == 0
    for name, summary in COMMANDS.items():
        assert f"{name} " in outcome.out
        assert summary.split()[0] in outcome.out
    assert "3 a gate failed" in " ".join(outcome.out.split())


@pytest.mark.parametrize("args", [("--help",), ("--version",)])
def test_flora_starts_without_its_heavy_libraries(args):
    script = (
        "import sys; import flora.cli; sys.argv = ['flora', *sys.argv[1:]]; flora.cli.main();"
        "heavy = {'torch', 'timm', 'onnx', 'onnxruntime', 'numpy', 'pydantic', 'rich'} & set(sys.modules);"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "flora" in done.stdout


def test_help_of_all_commands_imports_no_torch():
    script = (
        "import sys; import flora.cli\n"
        "for name in flora.cli.COMMANDS:\n"
        "    sys.argv = ['flora', name, '--help']; flora.cli.main()\n"
        "print(sorted({'torch', 'timm', 'onnx', 'onnxruntime'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(("typed", "meant"), [("materialise", "materialize"), ("exprot", "export")])
def test_an_unknown_command_suggests_a_near_one(typed, meant):
    outcome = flora(typed)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"Did you mean {meant}" in outcome.message


@pytest.mark.parametrize("name", COMMAND_NAMES)
def test_an_unknown_option_is_a_usage_error(name):
    outcome = flora(name, "--no-such-option")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--no-such-option" in outcome.message


def test_a_misspelt_option_suggests_the_right_one():
    outcome = flora("export", "folder", "--evaldata", "images")
    assert outcome.code == 2
    assert "--eval-data" in outcome.message


TRAINING_FREE = ("compress", "m", "--budget", "macs=50%", "--calib-data", "x", "--eval-data", "y", "-o", "out")
USAGE = {
    "no output": (["build", "model", "--method", "svd"], "--out"),
    "svd looks at no images": (["build", "model", "--method", "svd", "--data", "x", "-o", "out"], "leave --data out"),
    "activation needs images": (["build", "model", "-o", "out"], "--method activation needs --data"),
    "unknown method": (["build", "model", "--method", "pca", "-o", "out"], "'activation', 'svd'"),
    "no ranks": (["materialize", "net", "-o", "out"], "in one way"),
    "ranks twice": (["materialize", "net", "--uniform", "0.5", "--uniform-macs", "50%", "-o", "out"], "in one way"),
    "a ratio that is no number": (["materialize", "net", "--uniform", "half", "-o", "out"], "half"),
    "no evaluation images": (["export", "model", "-o", "out"], "--eval-data"),
    "unknown target": (["export", "m", "--eval-data", "x", "--to", "tensorrt-rtxx", "-o", "out"], "Did you mean"),
    "batches that fall": (["export", "m", "--eval-data", "x", "--batch", "8,1,64", "-o", "out"], "must rise"),
    "batch of none": (["export", "m", "--eval-data", "x", "--batch", "0,1,8", "-o", "out"], "must rise"),
    "one batch": (["export", "m", "--eval-data", "x", "--batch", "8", "-o", "out"], "MIN,OPT,MAX"),
    "no repeats": (["export", "m", "--eval-data", "x", "--repeats", "0", "-o", "out"], "--repeats"),
    "a gate without images": (["verify", "bundle", "--max-drop", "2"], "needs --data"),
    "no images": (["eval", "model"], "--data"),
    "batches that are none": (["bench", "bundle", "--batch", "1;8"], "write 1,8,32"),
    "no threads to time on": (["bench", "bundle", "--threads", "0"], "--threads"),
    "no threads": (["eval", "model", "--data", "x", "--threads", "0"], "--threads"),
    "no selection images": (["filter", "net", "-o", "out"], "--select-data"),
    "no training images": (["train", "net", "-o", "out"], "--data"),
    "no budget": (["search", "net", "--select-data", "x", "-o", "out"], "--budget"),
    "local without images": (["filter", "n", "--select-data", "x", "--scorer", "local", "-o", "out"], "needs --data"),
    "images without local": (["filter", "n", "--select-data", "x", "--data", "y", "-o", "out"], "takes none"),
    "settings without local": (["filter", "n", "--select-data", "x", "--epochs", "3", "-o", "out"], "--scorer local"),
    "a preset without local": (
        ["filter", "n", "--select-data", "x", "--preset", "local", "-o", "out"],
        "--scorer local",
    ),
    "unknown scorer": (["filter", "n", "--select-data", "x", "--scorer", "lokal", "-o", "out"], "'local'"),
    "unknown fitness": (["search", "n", "--fitness", "top5", "-o", "out"], "'top1'"),
    "unknown sampling": (["train", "n", "--data", "x", "--sampling", "unifrom", "-o", "out"], "'uniform'"),
    "unknown augmentation": (["train", "n", "--data", "x", "--augmentation", "heavy", "-o", "out"], "'imagenet'"),
    "no classes kept": (["train", "n", "--data", "x", "--top-k", "0", "-o", "out"], "--top-k"),
    "nothing to calibrate on": (
        ["compress", "m", "--budget", "macs=50%", "--eval-data", "y", "-o", "out"],
        "--calib-data",
    ),
    "training images that nothing trains on": ([*TRAINING_FREE, "--data", "x"], "--data belongs to --method supernet"),
    "epochs without training": ([*TRAINING_FREE, "--epochs", "3"], "--epochs belongs to --method supernet"),
    "nothing to train on": (
        ["compress", "m", "--method", "supernet", "--budget", "macs=50%", "--eval-data", "y", "-o", "out"],
        "--data",
    ),
    "unknown method of compressing": (["compress", "m", "--method", "svd", "-o", "out"], "'supernet'"),
    "neither a budget nor a family": (["compress", "m", "--calib-data", "x", "-o", "out"], "either --budget"),
    "a budget and a family": ([*TRAINING_FREE, "--family", "60%,50%"], "either --budget"),
    "epochs that are none": (["compress", "m", "--finetune-epochs", "-1", "-o", "out"], "--finetune-epochs"),
    "half an argument": (["eval", "vit", "--data", "x", "-K", "depth"], "KEY=VALUE"),
}


@pytest.mark.parametrize(("args", "says"), USAGE.values(), ids=USAGE)
def test_usage_errors_exit_2_and_write_nothing(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = flora(*args)
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.message
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_what_works_here():
    outcome = flora("doctor", "--json")
    assert outcome.code == 0, outcome
    said = json.loads(outcome.out)
    findings = {finding["name"]: finding for finding in said["findings"]}
    assert findings["torch"]["works"]
    assert findings["ONNX Runtime, CPU"]["works"]
    assert all(finding["works"] or finding["advice"] for finding in findings.values())


def test_help_needs_no_terminal():
    """click's own runner, with a narrow terminal, breaks no help text."""
    for name in COMMAND_NAMES:
        assert CliRunner().invoke(group, [name, "--help"], terminal_width=40).exit_code == 0
