"""Lower precisions: made from images of their own, mixed until the gate holds, shipped only when faster and right."""

import hashlib
import json
import shutil
import tarfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from calibrate.mixed import products_by_layer
from export.bundle import load_bundle
from export.comparison import compare
from export.runtimes import RUNTIMES
from export.thresholds import THRESHOLDS, Thresholds
from flora.errors import InputError
from flora.lowrank.checkpoint import load_model
from flora.pipeline.export import _wanted
from flora.pipeline.export_request import ExportRequest
from flora.pipeline.family import _member
from flora.pipeline.precision import (
    Workbench,
    logits_of_file,
    open_judges,
    precisions_asked,
    spread_over,
    write_precision,
)
from flora.pipeline.proof import Exported
from tests.flora_command import assert_nothing_at, assert_refused, flora
from tests.worked_example import FASHION, QUICK

CALIBRATION = FASHION / "selection.tar"


def export(worked, out: Path, *more: object):
    command = ("export", worked.compact, "--eval-data", worked.images, "-o", out, *QUICK)
    return flora(*command, "--calib-data", CALIBRATION, "--calib-images", 24, *more)


def manifest_of(bundle: Path) -> dict:
    return json.loads((bundle / "manifest.json").read_text())


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    """The trained example: half precision moves the answers of random weights as much as INT8 those of real ones."""
    root = tmp_path_factory.mktemp("stacked")
    built = flora("build", FASHION / "model", "--data", f"{CALIBRATION},limit=64", "-o", root / "supernet")
    cut = flora("materialize", root / "supernet", "--uniform-macs", "40%", "-o", root / "compact")
    out = root / "bundle"
    outcome = flora(
        *("export", root / "compact", "--eval-data", f"{FASHION / 'test.tar'},limit=200", "-o", out, *QUICK),
        *("--precision", "fp16,int8", "--compare", "--calib-data", f"{CALIBRATION},limit=64", "--calib-images", 24),
        *("--max-drop", 4),
    )
    assert (built.code, cut.code) == (0, 0)
    return out, outcome


@pytest.fixture(scope="module")
def bench(worked, tmp_path_factory) -> Workbench:
    preprocessing = load_model(str(worked.dense)).config.preprocessing
    judges = open_judges(str(CALIBRATION), None, preprocessing, 10, count=24, seed=0)
    return Workbench(
        judges=judges,
        yardstick=worked.bundle / "onnx" / "dense-fp32.onnx",
        limits=THRESHOLDS,
        runtime="ort-cpu",
        threads=1,
        batch=8,
        scratch=tmp_path_factory.mktemp("scratch"),
        on_step=lambda step: None,
    )


def test_every_precision_is_made_measured_and_labelled(stacked):
    out, outcome = stacked
    assert outcome.code == 0, outcome.message
    manifest = manifest_of(out)
    entries = {entry["path"]: entry for entry in manifest["artifacts"]}
    names = [f"onnx/{model}-{kind}.onnx" for model in ("dense", "model") for kind in ("fp32", "fp16", "int8")]
    assert set(entries) == set(names)
    assert {entry["name"] for entry in entries.values()} < set(manifest["latency"])
    for path, entry in entries.items():
        assert (entry["attestation"] is None) == ("fp32" in path)
        assert (entry["quantization"] is not None) == ("int8" in path)
    made = entries["onnx/model-int8.onnx"]["quantization"]
    assert made["images"] == 24
    best = f"{made['method']}, {made['basis']} basis, {made['weight_bits']}-bit weights"
    assert made["trials"][best] == max(made["trials"].values()) > 10
    assert len(made["trials"]) >= 3
    assert set(made["high"].values()) <= {"int8 takes longer", "for the gate"}


def test_the_recommended_file_is_the_fastest_of_those_certified(stacked):
    manifest = manifest_of(stacked[0])
    certified = {stage["name"].split(", batch")[0] for stage in manifest["verification"]["stages"]}
    ratios = {entry["name"]: manifest["latency"][entry["name"]]["ratio"] for entry in manifest["artifacts"]}
    assert ratios[manifest["recommended"]] == min(ratios[name] for name in ratios if name in certified)
    low = [name for name in ratios if "int8" in name or "fp16" in name]
    # The evaluation images see one of them at most: nothing is chosen by them.
    assert sum(name in certified for name in low) <= 1
    chosen_on = {stage["name"].split(", batch")[0] for stage in manifest["selection"]["stages"]}
    assert set(low) <= chosen_on
    assert manifest["image_sets"]["calibration"]["images"] >= 24
    assert not set(manifest["image_sets"]["evaluation"]["image_digests"]) & {
        digest for role in ("calibration", "selection") for digest in manifest["image_sets"][role]["image_digests"]
    }


def test_losers_say_why_and_the_bundle_verifies(stacked):
    out, outcome = stacked
    manifest = manifest_of(out)
    certified = {stage["name"].split(", batch")[0] for stage in manifest["verification"]["stages"]}
    for entry in manifest["artifacts"]:
        assert (entry["reason"] is None) == (entry["name"] in certified)
    assert "Lower precisions: how they were made" in outcome.out
    assert flora("verify", out, "--data", f"{FASHION / 'test.tar'},limit=100", "--max-drop", 4).code == 0


def test_a_family_tells_what_each_budget_is_to_ship(stacked):
    bundle = load_bundle(stacked[0])
    member = _member("macs=40%", bundle)
    entry = next(one for one in bundle.manifest.artifacts if one.precision == member.precision and "model" in one.path)
    assert member.size_bytes == entry.size_bytes
    assert member.latency_ratio == bundle.manifest.latency[entry.name].ratio
    if bundle.manifest.recommended != "dense, ONNX Runtime":
        assert entry.name == bundle.manifest.recommended
    assert member.passed
    short = replace(bundle, manifest=bundle.manifest.model_copy(update={"unmet": ["int8 takes 70 %"]}))
    assert not _member("macs=40%", short).passed


def test_errors_are_measured_on_images_of_every_class(bench):
    assert len(bench.judges.held_out(20)) == 20
    assert set(spread_over(bench.judges.spread, 20).labels()) == set(range(10))


def test_what_is_required_of_what_cannot_be_run_is_not_met():
    request = ExportRequest(eval_data=None, runtime="openvino", precisions=("fp8",), require="fp8>=80%")
    assert request.unseen([]) == ["fp8>=80% is required, and nothing computed in fp8 here to see it"]
    assert request.unmet("fp8", None) == []


def test_a_scale_four_times_too_large_is_caught_and_named(stacked, tmp_path):
    bundle = shutil.copytree(stacked[0], tmp_path / "bundle")
    manifest = manifest_of(bundle)
    (low,) = (entry for entry in manifest["artifacts"] if entry["path"] == "onnx/model-int8.onnx")
    model = onnx.load(bundle / low["path"])
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    scale = next(constants[node.input[1]] for node in model.graph.node if _is_weight(node, constants))
    scale.CopyFrom(numpy_helper.from_array(4 * numpy_helper.to_array(scale), scale.name))
    onnx.save(model, bundle / low["path"])
    digest = hashlib.sha256((bundle / low["path"]).read_bytes()).hexdigest()
    low["certified"] = True
    low["sha256"] = manifest["files"][low["path"]] = digest
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    outcome = flora("verify", bundle, "--threads", 1)
    assert outcome.code == 3
    assert "The gate failed at factorized int8" in outcome.message


def _is_weight(node: onnx.NodeProto, constants: dict) -> bool:
    return node.op_type == "DequantizeLinear" and node.input[0] in constants


def test_images_that_are_normalized_in_another_way_are_told_from_a_model_that_is_wrong(stacked, tmp_path):
    bundle = shutil.copytree(stacked[0], tmp_path / "bundle")
    manifest = manifest_of(bundle)
    manifest["preprocessing"]["std"] = [value / 5 for value in manifest["preprocessing"]["std"]]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    outcome = flora("verify", bundle, "--data", f"{FASHION / 'test.tar'},limit=60", "--threads", 1, "--max-drop", 4)
    assert outcome.code == 3
    assert "manifest.json: preprocessing is {" in outcome.out
    assert "is " in outcome.out.partition("dense, ONNX Runtime, batch 1: top1 ")[2]
    assert "Look at how they are preprocessed" in outcome.out


@dataclass(frozen=True, kw_only=True)
class PayingWorkbench(Workbench):
    """A bench of which every kind of layer saves time in INT8: what goes back does so for the gate."""

    def time_ratio(self, path: Path, other: Path) -> float:
        return 1.1


def test_layers_go_back_until_the_gate_holds(worked, bench, tmp_path):
    source = worked.bundle / "onnx" / "model-fp32.onnx"
    loose, tight = tmp_path / "loose.onnx", tmp_path / "tight.onnx"
    limits = bench.limits | {"int8": Thresholds(), "lowrank": Thresholds()}
    bench = PayingWorkbench(**{field.name: getattr(bench, field.name) for field in fields(bench)})
    anything = replace(bench, limits=limits, scratch=tmp_path / "loose")
    anything.scratch.mkdir()
    first = write_precision("int8", source, loose, anything, "factorized")
    images = bench.judges.held_out(75)
    expected, found = (logits_of_file(file, images, "ort-cpu", 1) for file in (source, loose))
    error = 1 - compare(expected, found).cosine.mean()
    limits |= {"int8": Thresholds(min_cosine=1 - error / 3)}
    strict = replace(bench, limits=limits, scratch=tmp_path)
    assert strict.failures(loose, "int8", source)
    second = write_precision("int8", source, tight, strict, "factorized")
    assert strict.failures(tight, "int8", source) == []
    assert second.sensitivity
    assert not first.sensitivity
    kept = [layer for layer, reason in second.high.items() if reason == "for the gate"]
    layers = products_by_layer(onnx.load(source), onnx.load(tight))
    assert kept
    assert layers
    assert not set(kept) & set(layers)


def test_a_gate_that_no_layer_holds_leaves_a_file_that_fails(worked, bench, tmp_path):
    source = worked.bundle / "onnx" / "model-fp32.onnx"
    hopeless = replace(bench, limits=bench.limits | {"int8": Thresholds(max_kl=0)}, scratch=tmp_path)
    write_precision("int8", source, tmp_path / "int8.onnx", hopeless, "factorized")
    assert any("kl is" in line for line in hopeless.failures(tmp_path / "int8.onnx", "int8", source))


def test_engines_are_built_from_files_of_their_own_and_these_are_verified_but_not_shipped(worked, tmp_path):
    options = ("--precision", "int8,fp8", "--to", "onnx,tensorrt-rtx", "--compute-capabilities", "sm89")
    # They are shown on ONNX Runtime, whatever the others run on.
    outcome = export(worked, tmp_path / "bundle", *options, "--max-drop", 100, "--runtime", "openvino")
    assert outcome.code == 0, outcome.message
    manifest = manifest_of(tmp_path / "bundle")
    entries = {entry["path"]: entry for entry in manifest["artifacts"]}
    engines = {path for path, entry in entries.items() if entry["kind"] == "engine"}
    assert engines == {f"engines/model-{precision}-tensorrt-rtx.engine" for precision in ("fp32", "int8-fp16", "fp8")}
    for precision in ("int8-fp16", "fp8"):
        source, engine = (
            entries[f"onnx/model-{precision}.onnx"],
            entries[f"engines/model-{precision}-tensorrt-rtx.engine"],
        )
        made = source["quantization"]
        assert made == engine["quantization"]
        assert (source["certified"], engine["status"]) == (False, "built, not run")
        # Of random weights little precision keeps the answers; the engine says of its file what was found.
        assert source["status"] in ("verified", "failed")
        assert (source["status"] == "failed") == ("its ONNX file failed" in engine["reason"])
        assert ("it is for engines; it passed" in source["reason"]) == (source["status"] == "verified")
        assert source["name"] not in manifest["latency"]
        assert source["attestation"] is None
        graph = onnx.load(tmp_path / "bundle" / source["path"]).graph
        scales = {node.input[1] for node in graph.node if node.op_type == "QuantizeLinear"}
        types = {tensor.data_type for tensor in graph.initializer if tensor.name in scales}
        assert types == {onnx.TensorProto.FLOAT16}
    assert "fp16" not in manifest["recommended"]


def test_what_is_required_and_not_so_fails_the_build(worked, tmp_path):
    outcome = export(worked, tmp_path / "bundle", "--precision", "int8", "--require", "int8>=100%", "--max-drop", 30)
    assert outcome.code == 3
    assert "100 % are required" in outcome.message
    manifest = manifest_of(tmp_path / "bundle")
    assert manifest["unmet"]
    assert "int8" not in manifest["recommended"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--precision", "int4"),
            "no precision; give fp32, fp16, bf16, int8, int8-fp16, fp8 or auto. Did you mean int8",
        ),
        (("--precision", "bf16"), "ort-cpu runs no files in bf16, only fp32, fp16, int8, int8-fp16, fp8"),
        (("--precision", "fp16", "--require", "int8>=80%"), "the precisions do not name int8"),
        (("--precision", "int8", "--require", "int8>80"), "give a precision and the least share"),
        (
            ("--precision", "fp8", "--to", "tensorrt-rtx", "--compute-capabilities", "sm86,sm89"),
            "fp8 needs a GPU of sm89, sm120, sm121; got sm86, sm89",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(worked, tmp_path, options, message):
    outcome = export(worked, tmp_path / "bundle", *options)
    assert_refused(outcome, message)
    assert_nothing_at(tmp_path / "bundle")


def test_images_are_needed_and_never_those_of_the_evaluation(worked, tmp_path):
    command = ("export", worked.compact, "--eval-data", worked.images, "-o", tmp_path / "bundle", *QUICK)
    assert_refused(flora(*command, "--precision", "int8"), "name some, which need no labels")
    seen = flora(*command, "--precision", "int8", "--calib-data", worked.images)
    assert_refused(seen, "are also in the calibration set")
    same = flora(*command, "--precision", "int8", "--calib-data", CALIBRATION, "--select-data", CALIBRATION)
    assert_refused(same, "images of the selection set")
    assert_nothing_at(tmp_path / "bundle")


def test_one_image_calibrates_and_constant_ones_do_not(worked, tmp_path):
    one = export(worked, tmp_path / "one", "--precision", "int8", "--calib-images", 1, "--max-drop", 100)
    assert one.code in (0, 3), one.message
    manifest = manifest_of(tmp_path / "one")
    (low,) = (entry for entry in manifest["artifacts"] if entry["precision"] == "int8")
    assert low["quantization"]["images"] == 1
    assert any("selection images, which hardly tell one from another" in note for note in manifest["notes"])
    black = tmp_path / "black.tar"
    with tarfile.open(black, "w") as archive:
        for i in range(8):
            archive.addfile(*_black(i))
    refused = flora(
        "calibrate", worked.bundle, "--data", black, "--select-data", CALIBRATION, "-o", tmp_path / "8.onnx"
    )
    assert_refused(refused, "of one and the same value")
    assert_nothing_at(tmp_path / "8.onnx")


def _black(number: int):
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (28, 28)).save(buffer, "PNG", pnginfo=None, compress_level=number)
    info = tarfile.TarInfo(f"{number}.png")
    info.size = buffer.tell()
    buffer.seek(0)
    return info, buffer


def test_on_a_gpu_the_dense_model_in_fp16_is_the_yardstick(worked):
    loaded = load_model(str(worked.dense))
    both = [
        Exported(
            name=name,
            runtime="ort-cpu",
            role=role,
            model=loaded,
            path=f"onnx/{file}-fp32.onnx",
            module=loaded.module,
        )
        for name, role, file in (("dense", "yardstick", "dense"), ("factorized", "candidate", "model"))
    ]
    found = {
        runtime: [(one.path, one.role) for one in _wanted(both, ExportRequest(eval_data=None, **asked))]
        for runtime, asked in (
            (runtime, {"runtime": runtime, "precisions": ("fp16", "int8")}) for runtime in ("ort-cuda", "ort-cpu")
        )
    }
    of_model = [("onnx/model-fp16.onnx", "candidate"), ("onnx/model-int8.onnx", "candidate")]
    assert found == {"ort-cuda": [("onnx/dense-fp16.onnx", "yardstick"), *of_model], "ort-cpu": of_model}


def test_precisions_follow_the_runtime():
    assert precisions_asked(["auto"], "ort-cpu", has_engines=False) == ("fp32", "int8")
    assert precisions_asked(["auto", "bf16"], "ort-cuda", has_engines=False) == ("fp32", "fp16", "int8", "bf16")
    assert precisions_asked(["bf16"], "ort-cpu", has_engines=True) == ("fp32", "bf16")
    assert precisions_asked(["int8"], "openvino", has_engines=True) == ("fp32", "int8", "int8-fp16")
    assert precisions_asked([], "openvino", has_engines=False) == ("fp32",)
    with pytest.raises(InputError, match="runs no files in fp8"):
        precisions_asked(["fp8"], "openvino", has_engines=False)
    for runtime in RUNTIMES.values():
        assert {*runtime.worthwhile, *runtime.only_shown} <= set(runtime.files)
        assert not set(runtime.worthwhile) & set(runtime.only_shown)


def test_compress_takes_precisions_and_does_nothing_twice(worked, tmp_path):
    command = (
        *("compress", worked.dense, "--calib-data", worked.calibration, "--eval-data", worked.images),
        *("--budget", "macs=70%", "--layers", "qkv,fc1", "--export-precision", "int8", "--calib-images", 8),
        *("--max-drop", 100, "--threads", 1, "-o", tmp_path / "bundle"),
    )
    first = flora(*command)
    assert first.code in (0, 3), first.message
    manifest = manifest_of(tmp_path / "bundle")
    (low,) = (entry for entry in manifest["artifacts"] if entry["precision"] == "int8")
    assert low["quantization"]["images"] == 8
    assert low["name"] in manifest["latency"]
    assert "nothing to do" in flora(*command).err
