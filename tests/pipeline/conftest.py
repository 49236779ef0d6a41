"""The worked example: one tiny model, built, materialized and exported once for all tests."""

import shutil
from pathlib import Path

import pytest

from export.runners import OnnxRunner
from tests.worked_example import WorkedExample, worked_example


@pytest.fixture(scope="session")
def worked(tmp_path_factory: pytest.TempPathFactory) -> WorkedExample:
    return worked_example(tmp_path_factory.getbasetemp() / "worked-example")


@pytest.fixture
def bundle(worked, tmp_path) -> Path:
    """A copy of the bundle, to be changed or damaged."""
    return shutil.copytree(worked.bundle, tmp_path / "bundle")


@pytest.fixture
def never_run(monkeypatch) -> None:
    """Opening any ONNX file fails the test."""

    def refuse(self, path, **options):
        pytest.fail(f"{path} was run")

    monkeypatch.setattr(OnnxRunner, "__init__", refuse)
