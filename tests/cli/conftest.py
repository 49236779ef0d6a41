"""The worked example: one tiny model, built, materialized and exported once for all tests."""

import pytest

from tests.worked_example import WorkedExample, worked_example


@pytest.fixture(scope="session")
def worked(tmp_path_factory: pytest.TempPathFactory) -> WorkedExample:
    return worked_example(tmp_path_factory.getbasetemp() / "worked-example")
