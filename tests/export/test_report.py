"""Reports: a function of the bundle, every figure one of the manifest, nothing from elsewhere, nothing run."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from export.bundle import REPORT, PartCost, check_hashes, load_bundle
from export.report.comparison import comparison_page
from export.report.facts import limits_of
from export.report.format import FORMS, resolved
from export.report.page import add_report, report_page, sound_bundle
from export.report.scatter import Point, front_of
from export.thresholds import THRESHOLDS, thresholds_with
from export.verify import VerifyReport
from flora.errors import InputError
from tests.report_samples import HOSTILE, rich_bundle

ROOT = Path(__file__).parent.parent.parent


class Page(HTMLParser):
    """What a test looks at: figures with their paths and texts, all attributes, plots, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[tuple[list, object, str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.plots: dict[str, dict] = {}
        self._open: dict[str, str] = {}
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._tag, self._open = tag, {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        self._tag, self._open = "", {}

    def handle_data(self, data):
        if "data-of" in self._open:
            self.figures.append((json.loads(self._open["data-of"]), json.loads(self._open["value"]), data))
        if self._tag == "script" and self._open.get("type") == "application/json":
            self.plots[self._open["id"].removeprefix("data-")] = json.loads(data)
        if self._tag not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def bundle(tmp_path):
    return rich_bundle(tmp_path / "bundle")


@pytest.fixture
def page(bundle) -> Page:
    return Page(report_page(bundle))


def test_every_figure_is_that_of_the_manifest_and_its_text_says_so(bundle, page):
    facts = json.loads((bundle.folder / "manifest.json").read_text())
    assert len(page.figures) > 150
    for path, value, text in page.figures:
        assert value == resolved(facts, path), path
        assert text in {form(value) for form in FORMS.values() if _takes(form, value)}, (path, text)


def _takes(form, value) -> bool:
    return isinstance(value, str) == (form is FORMS["text"]) or (form is FORMS["text"])


def test_no_section_of_the_manifest_is_left_out(bundle, page):
    """Artefacts, stages with intervals and reasons, layers, parts, precisions, images, versions, digests and notes."""
    manifest = bundle.manifest
    words = [
        *(entry.name for entry in manifest.artifacts),
        *(entry.reason for entry in manifest.artifacts if entry.reason),
        *(stage.name for stage in manifest.verification.stages),
        *(line for stage in manifest.verification.stages for line in stage.failures),
        *(digest for digest in manifest.files.values()),
        *manifest.versions.values(),
        *manifest.device.values(),
        *(manifest.image_sets["evaluation"].digest, "not measured", "a note", "class <6>", HOSTILE),
    ]
    assert [word for word in words if " ".join(word.split()) not in page.text] == []
    shown = {tuple(path) for path, _, _ in page.figures}
    assert {("verification", "stages", 2, name) for name in ("drop", "drop_low", "drop_high", "p_value")} <= shown
    assert {("layers", place, name) for place in range(8) for name in ("rank", "sensitivity")} <= shown
    assert ("verification", "stages", 3, "worst", 1, "kl") in shown


def test_the_page_asks_for_nothing(page):
    """Not even for what a hostile name in the manifest asks for."""
    links = {
        value for _, name, value in page.attributes if name in ("src", "href", "action", "srcset", "data", "poster")
    }
    assert all(link.startswith(("#", "data:")) for link in links)
    policy = next(
        value for tag, name, value in page.attributes if (tag, name) == ("meta", "content") and "src" in value
    )
    assert policy.startswith("default-src 'none'")
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert "<script>alert" not in "".join(page.texts).replace(HOSTILE, "")


def test_plots_hold_what_was_certified(bundle, page):
    assert page.plots.keys() == {"accuracy-latency", "accuracy-macs", "accuracy-size", "latency", "macs", "time"}
    points = {trace["name"]: (trace["x"][0], trace["y"][0]) for trace in page.plots["accuracy-macs"]["data"][1:]}
    assert points == {
        "dense": (138_620_000, 89.125),
        "factorized": (54_870_000, 89.125),
        "factorized INT8": (54_870_000, 89.125),
        "factorized FP16": (54_870_000, 89.125),
    }
    symbols = {trace["name"]: trace["marker"]["symbol"] for trace in page.plots["accuracy-macs"]["data"][1:]}
    assert symbols == {"dense": "square", "factorized": "circle", "factorized INT8": "circle", "factorized FP16": "x"}
    time = {trace["name"]: dict(zip(trace["y"], trace["x"], strict=True)) for trace in page.plots["time"]["data"]}
    assert time["factorized"] == {"LayerNorm": 0.0625, "attention": 0.125, "fc1": 0.3125}
    assert sum(time["dense"].values()) == 1


def test_a_report_is_the_same_once_it_is_part_of_the_bundle(bundle):
    text = report_page(bundle)
    add_report(bundle.manifest, bundle.folder).save(bundle.folder / "manifest.json")
    assert (bundle.folder / REPORT).read_text() == text
    again = sound_bundle(bundle.folder)
    assert REPORT in again.manifest.files
    assert report_page(again) == text


def test_an_altered_bundle_or_another_folder_has_no_report(bundle, tmp_path):
    (bundle.folder / "onnx/dense-fp32.onnx").write_bytes(b"other")
    assert check_hashes(load_bundle(bundle.folder)) != []
    with pytest.raises(InputError, match=r"not what was exported \(onnx/dense-fp32.onnx was altered\)"):
        sound_bundle(bundle.folder)
    with pytest.raises(InputError, match="no bundle: it holds no manifest"):
        sound_bundle(tmp_path)


def test_a_bundle_without_anything_to_ship_says_so(tmp_path):
    changes = {"recommended": None, "recommendation_reason": "nothing passed its gate", "unmet": ["too little INT8"]}
    page = Page(report_page(rich_bundle(tmp_path / "bundle", **changes)))
    assert "Nothing to ship" in page.text
    assert "Required and not met: too little INT8" in page.text
    assert "ship this" not in page.text


def test_a_bare_manifest_is_enough(tmp_path):
    """A dense model of an earlier export, without layers, parts, images or selection."""
    bare = {"layers": [], "selection": None, "verification": None, "latency": {}, "image_sets": {}, "notes": []}
    bundle = rich_bundle(tmp_path / "bundle", **bare | {"class_names": None, "unmet": [], "device": {}, "versions": {}})
    page = Page(report_page(bundle))
    assert page.plots.keys() == {"macs"}
    assert "Ship the factorized INT8 model" in page.text


def test_without_labels_agreement_with_the_dense_model_stands_in_for_accuracy(tmp_path):
    labelled = rich_bundle(tmp_path / "labelled").manifest.verification
    gone = {"top1": None, "top1_standard_error": None, "top5": None, "drop": None, "drop_low": None, "drop_high": None}
    report = VerifyReport(stages=[stage.model_copy(update=gone) for stage in labelled.stages])
    page = Page(report_page(rich_bundle(tmp_path / "unlabelled", verification=report)))
    assert "98.8 % agree with the dense model; no labels" in page.text
    points = {trace["name"]: trace["y"][0] for trace in page.plots["accuracy-macs"]["data"][1:]}
    assert points == {"dense": 100, "factorized": 98.75, "factorized INT8": 98.75}  # FP16 was not held against dense
    assert page.plots["accuracy-macs"]["layout"]["yaxis"]["title"]["text"] == "agreement with the dense model, %"


def test_a_runtime_that_was_not_profiled_has_macs_and_no_times(tmp_path):
    bundle = rich_bundle(tmp_path / "bundle")
    silent = [
        entry.model_copy(update={"parts": {name: PartCost(macs=cost.macs) for name, cost in entry.parts.items()}})
        for entry in bundle.manifest.artifacts
    ]
    page = Page(report_page(rich_bundle(tmp_path / "silent", artifacts=silent)))
    assert "macs" in page.plots
    assert "time" not in page.plots
    assert "profile" not in page.text.partition("Where MACs and time go")[2].partition("Precisions")[0]


def test_limits_are_those_that_the_stage_was_held_against(bundle):
    stages, held = bundle.manifest.verification.stages, thresholds_with(0.5)
    assert limits_of(stages[0], held) == {}
    assert {name: limit.value for name, limit in limits_of(stages[2], held).items()} == {"drop": 0.5}
    assert {name: limit.value for name, limit in limits_of(stages[1], held).items()} == {
        "agreement": THRESHOLDS["fp32"].min_agreement,
        "cosine": THRESHOLDS["fp32"].min_cosine,
        "max_relative": THRESHOLDS["fp32"].max_relative,
        "kl": THRESHOLDS["fp32"].max_kl,
    }


def test_the_front_holds_what_nothing_beats():
    def point(label, accuracy, cost, role="candidate"):
        return Point(label=label, role=role, accuracy=accuracy, error=None, cost=cost)

    points = [point("slow", 90, 3), point("beaten", 89, 2.5), point("fast", 89.5, 1), point("x", 99, 0.1, "failed")]
    assert [one.label for one in front_of(points)] == ["fast", "slow"]


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        ("small", 6.5e-7, "6.5e\N{MINUS SIGN}7"),
        ("tiny", 0.00117, "1.2e\N{MINUS SIGN}3"),
        ("tiny", 0.0, "0"),
        ("points", -0.125, "\N{MINUS SIGN}0.12"),
        ("points", 0.0, "0.00"),
        ("large", 138_620_000, "138.62 M"),
        ("large", 12, "12"),
        ("share", 0.9875, "98.8 %"),
        ("size", 2**20, "1.00 MiB"),
        ("ms", 1234.5, "1,234 ms"),
    ],
)
def test_figures_are_written_the_same_way_everywhere(form, value, text):
    assert FORMS[form](value) == text


def test_bundles_of_one_device_are_compared_and_the_fastest_is_named(tmp_path):
    slow = rich_bundle(tmp_path / "slow", recommended="factorized, ONNX Runtime")
    fast = rich_bundle(tmp_path / "fast", verification=slow.manifest.verification)
    page = Page(comparison_page([slow, fast]))
    assert "The fastest that passed its gate is fast" in page.text
    assert "not across them" not in page.text
    assert page.plots.keys() == {"latency-0", "macs-0", "size-0"}
    facts = [json.loads((one.folder / "manifest.json").read_text()) for one in (slow, fast)]
    assert len(page.figures) > 8
    for path, value, _ in page.figures:
        assert value == resolved(facts, path), path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": {"cpu": "another", "cores": "2", "threads": "1"}}, "cpu"),
        ({"device": {"cpu": "a processor", "cores": "2", "threads": "2"}}, "threads"),
    ],
)
def test_latencies_of_other_devices_or_threads_are_not_compared(tmp_path, change, said):
    bundles = [rich_bundle(tmp_path / "here"), rich_bundle(tmp_path / "there", **change)]
    page = Page(comparison_page(bundles))
    assert "within 2 groups only, not across them" in page.text
    assert "The fastest" not in page.text
    assert page.plots.keys() == {"latency-0", "latency-1", "macs-0", "size-0"}
    assert re.search(rf"What differs.*\b{said}\b", page.text)


def test_a_report_needs_no_torch(bundle):
    code = (
        "import sys; sys.modules.update(torch=None, torchvision=None, timm=None)\n"
        "from pathlib import Path\nfrom export.report.page import report_page, sound_bundle\n"
        f"print(len(report_page(sound_bundle(Path({str(bundle.folder)!r})))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1_000_000
