"""`flora report`: one bundle's page, several compared, and what is refused."""

import json
import shutil

import pytest

from tests.flora_command import assert_nothing_at, assert_refused, flora
from tests.report_samples import rich_bundle


def test_an_export_ends_with_its_report_which_the_command_writes_again(worked, tmp_path):
    report = worked.bundle / "report.html"
    assert f"Report: {report}" in worked.outcomes["export"].out
    outcome = flora("report", worked.bundle, "-o", tmp_path / "page.html")
    assert outcome.code == 0, outcome
    assert outcome.out == f"Wrote {tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_bytes() == report.read_bytes()


def test_several_bundles_are_compared_and_json_says_what_was_written(tmp_path):
    bundles = [rich_bundle(tmp_path / name).folder for name in ("one", "two", "three")]
    outcome = flora("report", *bundles, "-o", tmp_path / "new/page.html", "--json")
    assert outcome.code == 0, outcome
    page = tmp_path / "new/page.html"
    assert json.loads(outcome.out) == {
        "report": str(page),
        "bundles": [str(bundle) for bundle in bundles],
        "size_bytes": page.stat().st_size,
    }
    assert "3 bundles compared" in page.read_text(encoding="utf-8")


def test_what_is_no_bundle_or_not_as_it_was_exported_is_refused(tmp_path):
    bundle = rich_bundle(tmp_path / "bundle").folder
    out = tmp_path / "page.html"
    assert_refused(flora("report", tmp_path / "none", "-o", out), "is no bundle", "manifest.json")
    altered = shutil.copytree(bundle, tmp_path / "altered")
    (altered / "onnx/model-int8.onnx").write_bytes(b"other")
    refused = flora("report", bundle, altered, "-o", out)
    assert_refused(refused, "altered is not what was exported", "onnx/model-int8.onnx was altered")
    assert_refused(flora("report", bundle, bundle, "-o", out), "named twice")
    assert_refused(flora("report", bundle, "-o", tmp_path), "is a folder", "name of a file")
    assert_refused(flora("report", bundle, "-o", bundle / "report.html"), "lies in the bundle", "another place")
    assert_nothing_at(out)


@pytest.mark.parametrize("args", [(), ("bundle",)])
def test_a_bundle_and_a_file_are_needed(args):
    outcome = flora("report", *args)
    assert outcome.code == 2
    assert "Missing" in outcome.err
