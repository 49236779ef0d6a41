"""The main job on the embedded example, as the README shows it: a trained ViT becomes a verified bundle."""

import json
import re
from pathlib import Path

import pytest

from tests.flora_command import flora

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the first block of flora commands in README.md gives, run with its folder `demo` elsewhere."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(
        block for block in re.findall(r"^```sh\n(.*?)^```", readme, re.MULTILINE | re.DOTALL) if "flora build" in block
    )
    demo = tmp_path_factory.mktemp("demo")
    for line in block.strip().splitlines():
        words = line.replace("demo/", f"{demo}/").replace("examples/", f"{ROOT}/examples/").split()
        outcome = flora(*words[1:], "--threads", 1, "--json")
        assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_the_example_is_trained(bundle):
    dense = bundle["verification"]["stages"][0]
    assert dense["images"] == 800
    assert dense["top1"] > 87


def test_forty_percent_of_the_macs_cost_less_than_a_point(bundle):
    stages = {stage["name"]: stage for stage in bundle["verification"]["stages"]}
    artifacts = {entry["name"]: entry for entry in bundle["artifacts"]}
    compact, dense = (artifacts[f"{name}, ONNX Runtime"] for name in ("factorized", "dense"))
    assert compact["macs"] < 0.4 * dense["macs"]
    assert stages["factorized, torch"]["drop"] <= 1.0
    assert all(stage["passed"] for stage in stages.values())


def test_the_factorized_file_is_faster_and_recommended(bundle):
    assert bundle["latency"]["factorized, ONNX Runtime"]["ratio"] < 1
    assert bundle["recommended"] == "factorized, ONNX Runtime"
