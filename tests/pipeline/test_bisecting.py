"""`flora verify --bisect` names the layer of a bundle's file that is wrong, altered or not, and passes sound ones."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from calibrate.half import half_onnx
from calibrate.ranges import measure_ranges
from calibrate.static import quantize_onnx
from export.bundle import GOLDEN, MANIFEST, ArtifactEntry, Manifest, hash_files, load_bundle, read_golden, write_golden
from export.images import LabelledImages
from export.runners import OnnxRunner
from flora.pipeline.bisect import bisect_bundle
from tests.flora_command import assert_refused, flora
from tests.pipeline.test_verifying import rehash, without_torch
from tests.samples import GREY

FP32, FP16, INT8 = (f"onnx/model-{precision}.onnx" for precision in ("fp32", "fp16", "int8"))
DENSE = "onnx/dense-fp32.onnx"
LAYER = "blocks.1.mlp.fc1"


@pytest.fixture(scope="module")
def sound_bundle(worked, tmp_path_factory) -> Path:
    """The bundle with files in FP16 and INT8 of the factorized model."""
    folder = tmp_path_factory.mktemp("bisecting") / "bundle"
    shutil.copytree(worked.bundle, folder)
    calibration = [batch for batch, _ in LabelledImages(worked.calibration, GREY).batches(16)]
    half_onnx(folder / FP32, folder / FP16, "fp16")
    quantize_onnx(folder / FP32, folder / INT8, measure_ranges(folder / FP32, calibration, "min-max"), weight_bits=7)
    images, logits = read_golden(folder / GOLDEN)
    for path in (FP16, INT8):
        with OnnxRunner(folder / path, threads=1) as run:
            logits[path] = run(images)
    write_golden(folder / GOLDEN, images, logits)
    manifest, files = load_bundle(folder).manifest, hash_files(folder)
    low = [
        ArtifactEntry(
            name=path,
            path=path,
            kind="onnx",
            precision=precision,
            role="candidate",
            status="verified",
            sha256=files[path],
            size_bytes=(folder / path).stat().st_size,
        )
        for path, precision in ((FP16, "fp16"), (INT8, "int8"))
    ]
    known = [entry.model_dump() for entry in (*manifest.artifacts, *low)]
    Manifest(**manifest.model_dump() | {"files": files, "artifacts": known}).save(folder / MANIFEST)
    return folder


@pytest.fixture
def bundle(sound_bundle, tmp_path) -> Path:
    return shutil.copytree(sound_bundle, tmp_path / "bundle")


def flip(path: Path, layer: str = LAYER) -> None:
    """The sign of a layer's last weight: of its scale where it is quantized."""
    model = onnx.load(path)
    product = [
        node for node in model.graph.node if node.op_type == "MatMul" and f"'{layer}" in str(node.metadata_props)
    ][-1]
    makers = {name: node for node in model.graph.node for name in node.output}
    weight = product.input[1]
    negate(model, makers[weight].input[1] if weight in makers else weight)
    onnx.save(model, path)


def negate(model: ModelProto, name: str) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), name))


def by_path(found) -> dict:
    return {one.path: one for one in found.files}


def test_a_sound_bundle_passes_and_says_what_fp32_is_compared_with(bundle):
    outcome = flora("verify", bundle, "--bisect", "--threads", 1)
    assert outcome.code == 0, outcome
    assert "First layer that departs, on 8 images" in outcome.out
    assert f"{FP32}: FP32 itself, compared with golden logits alone: it gives its golden logits." in outcome.out
    said = json.loads(flora("verify", bundle, "--bisect", "--threads", 1, "--json").out)
    assert said["passed"]
    files = {one["path"]: one for one in said["bisection"]["files"]}
    assert set(files) == {DENSE, FP32, FP16, INT8}
    for path in (FP16, INT8):
        assert files[path]["against"] == FP32
        assert files[path]["comparison"]["departures"] == []


@pytest.mark.parametrize("path", [FP16, INT8])
def test_an_altered_file_is_labelled_and_its_layer_named(bundle, path):
    flip(bundle / path)
    plain = flora("verify", bundle, "--threads", 1)
    assert_refused(plain, f"{path} was altered", "Nothing of it was run", "--bisect", code=3)
    outcome = flora("verify", bundle, "--bisect", "--threads", 1)
    assert outcome.code == 3
    assert f"{path} was altered" in outcome.message
    assert f"{path} (altered): the weights of {LAYER} are not those of the other file" in outcome.out
    assert "Copy the file again" in outcome.out
    found = by_path(bisect_bundle(bundle, threads=1))
    assert [one.path for one in found.values() if one.first is not None] == [path]
    assert found[path].is_altered


def test_a_wrong_file_that_the_manifest_vouches_for_is_named_with_how_to_keep_its_layer(bundle):
    flip(bundle / INT8)
    rehash(bundle, INT8)
    outcome = flora("verify", bundle, "--bisect", "--threads", 1)
    assert outcome.code == 3
    assert "against golden logits" in outcome.out
    assert (
        f"Keep the layer in FP32: flora calibrate {bundle / FP32} --data IMAGES --keep {LAYER} -o FILE" in outcome.out
    )


def test_an_altered_fp32_file_is_looked_for_in_a_sound_one_of_lower_precision(bundle):
    flip(bundle / FP32)
    found = by_path(bisect_bundle(bundle, threads=1))
    assert (found[FP32].first.layer, found[FP32].against) == (LAYER, FP16)
    assert found[FP32].is_altered
    for path in (FP16, INT8):
        assert found[path].comparison is None
        assert found[path].note == f"{FP32} is not as it was exported, so nothing is compared with it"


def test_an_fp32_file_without_another_is_held_against_its_golden_logits(bundle):
    flip(bundle / DENSE)
    one = by_path(bisect_bundle(bundle, threads=1))[DENSE]
    assert not one.holds
    assert "compared with golden logits alone: against golden logits" in one.note


def test_files_that_cannot_be_run_are_said_to_be_so_and_the_others_compared(bundle):
    content = (bundle / FP16).read_bytes()
    (bundle / FP16).write_bytes(content[: len(content) // 2])
    found = by_path(bisect_bundle(bundle, threads=1))
    assert "is no complete ONNX file" in found[FP16].note
    assert found[INT8].comparison is not None
    assert found[INT8].first is None
    (bundle / FP16).unlink()
    outcome = flora("verify", bundle, "--bisect", "--threads", 1)
    assert outcome.code == 3
    assert f"{FP16}: it is missing." in outcome.out


def test_without_golden_images_others_are_asked_for(bundle, worked):
    (bundle / GOLDEN).write_bytes(b"")
    assert_refused(flora("verify", bundle, "--bisect"), "golden.safetensors", "give images with --data")
    found = bisect_bundle(bundle, data=str(worked.images), threads=1)
    assert found.images == 32
    assert found.problems == ["golden.safetensors was altered"]
    assert found.departing == []
    assert "there is nothing to compare it with" in by_path(found)[FP32].note


def test_bisection_needs_no_torch(bundle):
    flip(bundle / FP16)
    done = without_torch("verify", bundle, "--bisect", "--threads", 1, "--json")
    assert done.returncode == 3, done.stderr
    files = {one["path"]: one for one in json.loads(done.stdout)["bisection"]["files"]}
    assert files[FP16]["comparison"]["departures"][0]["layer"] == LAYER


def test_an_overflow_says_that_fp16_has_no_room(bundle):
    model = onnx.load(bundle / FP32)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == f"{LAYER}.up.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(bias.dims[0], 6e4, np.float32), bias.name))
    onnx.save(model, bundle / FP32)
    half_onnx(bundle / FP32, bundle / FP16, "fp16")
    for path in (FP32, FP16):
        rehash(bundle, path)
    outcome = flora("verify", bundle, "--bisect", "--threads", 1)
    assert outcome.code == 3
    assert f"{FP16}: blocks.1.mlp.fc2 reaches a value between its two factors, beyond the range of FP16." in outcome.out
    assert "use bf16 or FP32 in place of this file" in outcome.out
