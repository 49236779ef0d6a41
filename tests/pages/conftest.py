"""One browser, and the pages that are looked at in it: a report of all that there can be, a real one, and a
comparison."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from export.report.comparison import comparison_page
from export.report.page import report_page
from tests.pages.browser import opened_browser
from tests.report_samples import rich_bundle
from tests.worked_example import WorkedExample, worked_example


@pytest.fixture(scope="session")
def browser() -> Browser:
    with opened_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def worked(tmp_path_factory: pytest.TempPathFactory) -> WorkedExample:
    return worked_example(tmp_path_factory.getbasetemp() / "worked-example")


@pytest.fixture(scope="session")
def pages(worked: WorkedExample, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files by what they show."""
    root = tmp_path_factory.mktemp("pages")
    rich, other = rich_bundle(root / "rich"), rich_bundle(root / "other", device={"cpu": "another"}, recommended=None)
    texts = {
        "everything": report_page(rich),
        "compressed": (worked.compressed / "report.html").read_text(encoding="utf-8"),
        "comparison": comparison_page([rich, other]),
    }
    files = {name: root / f"{name}.html" for name in texts}
    for name, text in texts.items():
        files[name].write_text(text, encoding="utf-8")
    return files
