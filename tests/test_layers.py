"""Imports point down: what each package may import, read from the sources, and what runs without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BOTTOM = {
    f"flora.{name}"
    for name in (
        "errors",
        "artifact",
        "preprocessing",
        "imagesets",
        "onnxfiles",
        "onnxsessions",
        "provenance",
        "resume",
    )
}
PACKAGES = ("flora.cli", "flora.pipeline", "flora.training", "flora.lowrank", "flora.ranks", "export", "calibrate")
SIBLING = {"flora.training", "flora.lowrank", "flora.ranks", *BOTTOM}
ALLOWED = {
    "flora.cli": {"flora.pipeline", "export", "calibrate", *SIBLING},
    "flora.pipeline": {"export", "calibrate", *SIBLING},
    "export": SIBLING,
    "calibrate": SIBLING,
    "flora.training": {"flora.lowrank", "flora.ranks", *BOTTOM},
    "flora.lowrank": {"flora.ranks", *BOTTOM},
    "flora.ranks": BOTTOM,
}
LIBRARIES_OF_RANKS = {*sys.stdlib_module_names, "numpy", "pydantic"}


def _sources(package: str) -> list[Path]:
    return sorted((ROOT / package.replace(".", "/")).rglob("*.py"))


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function; `from a import b` counts as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _part(module: str) -> str | None:
    """The package or bottom file that a module of ours belongs to; None for any other module."""
    parts = [part for part in (*PACKAGES, *BOTTOM) if module == part or module.startswith(f"{part}.")]
    return parts[0] if parts else None


def test_every_source_belongs_to_a_layer():
    sources = [path for package in ("flora", "export", "calibrate") for path in _sources(package)]
    assert {_module(path) for path in sources if _part(_module(path)) is None} == {"flora"}
    assert len(sources) > 30


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_lies_below_it(package: str):
    wrong = {
        f"{_module(path)} imports {name}"
        for path in _sources(package)
        for name in _imports(path)
        if (part := _part(name)) not in (None, package) and part not in ALLOWED[package]
    }
    assert wrong == set()


@pytest.mark.parametrize("module", sorted(BOTTOM))
def test_a_bottom_file_imports_only_bottom_files(module: str):
    imports = _imports(ROOT / f"{module.replace('.', '/')}.py")
    assert {name for name in imports if name.split(".")[0] in ("flora", "export", "calibrate")} <= {
        name for name in imports if _part(name) in BOTTOM
    }


def test_the_root_package_imports_nothing_of_ours():
    assert not {name for name in _imports(ROOT / "flora" / "__init__.py") if _part(name)}


def test_nobody_imports_the_command_line():
    sources = (*_sources("flora"), *_sources("export"), *_sources("calibrate"))
    wrong = {
        _module(path)
        for path in sources
        if _part(_module(path)) != "flora.cli" and any(_part(name) == "flora.cli" for name in _imports(path))
    }
    assert wrong == set()


def test_ranks_need_only_the_standard_library_numpy_and_pydantic():
    imported = {name.split(".")[0] for path in _sources("flora.ranks") for name in _imports(path)}
    assert imported - LIBRARIES_OF_RANKS == {"flora"}


def _python_without_torch(code: str) -> subprocess.CompletedProcess[str]:
    blocked = "import sys; sys.modules.update(torch=None, torchvision=None, timm=None)"
    return subprocess.run([sys.executable, "-c", f"{blocked}\n{code}"], capture_output=True, text=True, cwd=ROOT)


def test_ranks_work_without_torch():
    modules = [_module(path) for path in (*_sources("flora.ranks"), *(ROOT / "flora").glob("*.py"))]
    done = _python_without_torch("\n".join(f"import {module}" for module in modules) + "\nprint('imported')")
    assert (done.returncode, done.stdout.strip()) == (0, "imported"), done.stderr


def test_help_works_without_torch():
    done = _python_without_torch("from flora.cli import main; sys.argv = ['flora', '--help']; main()")
    assert done.returncode == 0, done.stderr
    assert "materialize" in done.stdout
