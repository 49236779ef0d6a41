"""The commands that README.md shows are ones that exist: targets of make, and commands of flora with their options."""

import re
import shlex
from pathlib import Path

import click
import pytest

from flora.cli import COMMANDS, flora
from flora.imagesets import ImageSetSpec
from flora.pipeline.search import budget_slug
from flora.ranks.budget import Budget, latency_parts
from flora.ranks.space import space_from_text
from flora.training.settings import PRESETS
from tests.samples import cost_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def shell_commands() -> list[str]:
    """The lines of code blocks, prompts taken off and continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines]


def commands_of(program: str) -> list[list[str]]:
    """The words of every command that runs `program`, without comments and what follows a pipe."""
    found = []
    for line in shell_commands():
        for part in re.split(r"\s(?:&&|\|)\s", line):
            words = shlex.split(part, comments=True) if re.match(rf"(\S+/)?{program}\s", part) else []
            if words:
                found.append(words)
    return found


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_the_readme_shows_commands():
    assert len(commands_of("make")) >= 1
    assert len(commands_of("flora")) >= 3


@pytest.mark.parametrize("words", commands_of("make"), ids=" ".join)
def test_targets_of_make_exist(words):
    named = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
    assert named
    assert set(named) <= targets()


@pytest.mark.parametrize("words", commands_of("flora"), ids=" ".join)
def test_commands_of_flora_parse(words):
    name, *args = words[1:]
    if name.startswith("-"):
        assert name in ("--help", "--version")
        return
    assert name in COMMANDS
    if "--help" in args:
        return
    command = flora.get_command(click.Context(flora), name)
    command.make_context(name, [arg for arg in args if arg not in ("...", "…")])


def parsed(words: list[str]) -> dict:
    """The options and arguments of a command of flora, as it would get them."""
    name, *args = words[1:]
    return flora.get_command(click.Context(flora), name).make_context(name, args).params


def road() -> list[dict]:
    """The commands of the paper's road one by one, each with its name and options."""
    section = README[README.index("### The paper's road") : README.index("### What lies in a bundle")]
    blocks = re.findall(r"^```sh\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    block = next(block for block in blocks if "flora search" in block)
    lines = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    return [parsed(words) | {"command": words[1]} for words in lines]


def test_each_step_of_the_papers_road_starts_from_what_an_earlier_one_wrote():
    written: set[str] = set()
    assert [step["command"] for step in road()][:5] == ["build", "filter", "train", "search", "materialize"]
    for step in road():
        if step["command"] != "build":
            assert str(step.get("supernet") or step["model"]) in written, step
        written.add(str(step["out"]))


def test_the_ranks_that_the_papers_road_materializes_are_those_that_its_search_writes():
    steps = {step["command"]: step for step in road()}
    search, materialize = steps["search"], steps["materialize"]
    assert len(search["budgets"]) > 1
    written = [f"{search['out']}/ranks-{budget_slug(budget)}.json" for budget in search["budgets"]]
    assert str(materialize["ranks"]) in written


def test_the_papers_road_chooses_by_other_images_than_it_learns_from():
    places: dict[str, set[int]] = {"data": set(), "select_data": set()}
    for step in road():
        for role, found in places.items():
            if text := step.get(role):
                found |= set(ImageSetSpec.parse(text).indices(1000))
    assert len(places["data"]) == 900
    assert len(places["select_data"]) == 100
    assert places["data"].isdisjoint(places["select_data"])


def test_a_preset_in_fp16_is_shown_with_the_gpu_that_it_needs():
    presets = {step["preset"]: step["device"] for step in road() if step.get("preset")}
    assert {device for preset, device in presets.items() if PRESETS[preset].precision == "fp16"} == {"cuda"}


@pytest.mark.parametrize("words", commands_of("flora"), ids=" ".join)
def test_budgets_spaces_and_presets_are_ones_that_exist(words):
    if words[1].startswith("-"):
        return
    options = parsed([word for word in words if word not in ("...", "…")])
    cost = cost_of((384, 1152, 197), (384, 384, 197), (384, 1536, 197))
    for text in options.get("budgets") or filter(None, [options.get("budget")]):
        if words[1] == "compress" and text.startswith("latency="):
            latency_parts(text)
        else:
            Budget.parse(text, cost)
    if text := options.get("space"):
        assert space_from_text(text, cost).size > 1
    assert options.get("preset") in (None, *PRESETS)
