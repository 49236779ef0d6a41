"""The commands that README.md shows are ones that exist: targets of make, and commands of flora with their options."""

import re
import shlex
from pathlib import Path

import click
import pytest

from flora.cli import COMMANDS, flora

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
