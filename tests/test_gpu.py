"""What only an NVIDIA GPU can show. Skipped without one; FLORA_REQUIRE_GPU=1 turns the skip into a failure."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from calibrate.half import half_onnx
from calibrate.ranges import measure_ranges
from calibrate.static import quantize_onnx
from export.attention import attention_blocks
from export.attestation import attest_engine
from export.comparison import compare
from export.device import present_gpu
from export.engine_record import EngineRecord
from export.engine_spec import COMPUTE_CAPABILITIES, EngineSpec
from export.engines import backend_version, engine_from_onnx
from export.onnx import onnx_from_module
from export.runners import CPU, OnnxRunner
from export.runtimes import open_runner
from export.tensorrt_runner import TensorRtRunner
from flora.errors import FloraError
from flora.lowrank.checkpoint import load_model
from flora.lowrank.compensate import compensate
from flora.lowrank.materialize import materialize
from flora.lowrank.replay import Replay
from flora.lowrank.supernet import active_ranks, build_supernet
from flora.lowrank.targets import find_targets, trace_cost
from flora.pipeline.latency import LatencyRequest, measure_latency
from flora.ranks.latency import LatencyModel
from flora.ranks.space import block_name, space_from_ratios
from flora.ranks.uniform import uniform_ranks
from flora.training.data import TimmImages
from flora.training.evaluate import logits_of
from flora.training.filtering import score_block
from flora.training.selection import SelectionImages, log_probabilities
from tests.flora_command import flora
from tests.samples import GREY, IMAGE, random_images, tiny_model
from tests.worked_example import QUICK, worked_example

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    if torch.cuda.is_available():
        return
    if os.environ.get("FLORA_REQUIRE_GPU") == "1":
        pytest.fail("FLORA_REQUIRE_GPU=1, but torch finds no CUDA GPU")
    pytest.skip("no CUDA GPU")


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx_from_module(tiny_model("vit"), path, preprocessing=GREY)
    return path


def test_logits_on_the_gpu_equal_those_on_the_cpu():
    model, images = tiny_model("vit"), random_images(4)
    batches = [(images, torch.zeros(4, dtype=torch.long))]
    on_cpu, _ = logits_of(model, batches)
    on_gpu, _ = logits_of(model.cuda(), batches)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)


def test_a_supernet_built_on_the_gpu_computes_what_one_built_on_the_cpu_does():
    images = random_images(8)
    outputs = []
    for device in ("cpu", "cuda"):
        model = tiny_model("vit").to(device)
        cost = trace_cost(model, find_targets(model), IMAGE)
        build_supernet(model, cost, batches=[images])
        with torch.inference_mode(), active_ranks(model, uniform_ranks(cost, 0.4)):
            outputs.append(model(images.to(device)).cpu())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-2, atol=1e-2)


def test_filtering_on_the_gpu_scores_as_on_the_cpu_and_keeps_its_inputs_off_it(supernet, vit_cost, image_folder):
    images = SelectionImages(TimmImages(str(image_folder), GREY), batch_size=8)
    dense = log_probabilities(tiny_model("vit"), images)
    space = space_from_ratios(vit_cost, [0.2, 1])
    on_cpu = score_block(supernet, space, vit_cost, 1, images, dense)
    supernet.cuda()
    on_gpu = score_block(supernet, space, vit_cost, 1, images, dense)
    assert on_gpu.errors == pytest.approx(on_cpu.errors, rel=1e-2, abs=1e-4)
    blocks = [block_name(block[0]) for block in space.blocks]
    replay = Replay(supernet, blocks, lambda: (batch for batch, _ in images.batches()))
    replay.move_to(1)
    assert replay._inputs
    assert {kept.device.type for kept in replay._inputs} == {"cpu"}


def test_compensation_on_the_gpu_comes_as_near_to_the_dense_model_as_on_the_cpu(supernet, vit_cost):
    images, ranks = random_images(16, seed=3), uniform_ranks(vit_cost, 0.3)
    expected = tiny_model("vit")(images)
    distances = []
    for device in ("cpu", "cuda"):
        compact, dense = materialize(supernet, ranks).to(device), tiny_model("vit").to(device)
        compensate(compact, dense, list(vit_cost.shapes), lambda: iter(images.split(8)))
        with torch.no_grad():
            distances.append((compact(images.to(device)).cpu() - expected).square().mean().item())
    assert distances[1] == pytest.approx(distances[0], rel=0.05)


def test_onnx_runtime_on_the_gpu_equals_the_cpu(onnx_file: Path):
    images = random_images(3).numpy()
    with (
        OnnxRunner(onnx_file, providers=("CUDAExecutionProvider", CPU)) as on_gpu,
        OnnxRunner(onnx_file) as on_cpu,
    ):
        assert on_gpu.provider == "CUDAExecutionProvider"
        np.testing.assert_allclose(on_gpu(images), on_cpu(images), rtol=1e-2, atol=1e-2)


def test_tensorrt_builds_an_engine_for_this_gpu_that_computes_what_the_file_says(onnx_file: Path, tmp_path: Path):
    engine = tmp_path / "model.engine"
    engine_from_onnx(onnx_file, engine, EngineSpec(backend="tensorrt", min_batch=1, opt_batch=2, max_batch=4))
    with TensorRtRunner(engine) as on_gpu, OnnxRunner(onnx_file) as on_cpu:
        for batch in (2, 4, 1):
            images = random_images(batch).numpy()
            np.testing.assert_allclose(on_gpu(images), on_cpu(images), rtol=1e-2, atol=1e-2)
        on_gpu.bind(images)()


def test_an_fp32_engine_computes_in_fp32_and_not_in_tf32(onnx_file: Path, tmp_path: Path):
    engine, images = tmp_path / "model.engine", random_images(4).numpy()
    engine_from_onnx(onnx_file, engine, EngineSpec(backend="tensorrt", max_batch=8))
    assert set(attest_engine(engine).shares) == {"fp32"}
    with TensorRtRunner(engine) as on_gpu, OnnxRunner(onnx_file) as on_cpu:
        assert compare(on_cpu(images), on_gpu(images)).max_relative < 1e-3


def test_every_batch_runs_in_a_profile_that_holds_it(onnx_file: Path, tmp_path: Path):
    engine = tmp_path / "model.engine"
    spec = EngineSpec(backend="tensorrt", min_batch=2, opt_batch=8, max_batch=16, more_profiles=((1, 1, 1),))
    engine_from_onnx(onnx_file, engine, spec)
    with TensorRtRunner(engine) as on_gpu, OnnxRunner(onnx_file) as on_cpu:
        assert on_gpu.profiles == spec.profiles
        for batch in (8, 1, 2, 16, 1, 1, 8):
            images = random_images(batch).numpy()
            np.testing.assert_allclose(on_gpu(images), on_cpu(images), rtol=1e-2, atol=1e-2)
        with pytest.raises(FloraError, match="2/8/16 and 1/1/1"):
            on_gpu(random_images(17).numpy())


def test_what_was_timed_is_kept_in_one_file_and_read_again(onnx_file: Path, tmp_path: Path):
    spec, cache = EngineSpec(backend="tensorrt", max_batch=8), tmp_path / "timing"
    sizes = []
    for name in ("first", "second"):
        engine_from_onnx(onnx_file, tmp_path / f"{name}.engine", spec, timing_cache=cache)
        (file,) = cache.iterdir()
        sizes.append(file.stat().st_size)
    assert sizes[1] >= sizes[0] > 0
    assert present_gpu().compute_capability in file.name
    with TensorRtRunner(tmp_path / "second.engine") as on_gpu, OnnxRunner(onnx_file) as on_cpu:
        images = random_images(2).numpy()
        np.testing.assert_allclose(on_gpu(images), on_cpu(images), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"builder_level": 1},
        {"builder_level": 5, "workspace_mib": 1024},
        {"hardware_compatible": "same-capability"},
        {"hardware_compatible": "ampere-plus"},
        {"version_compatible": True},
    ],
)
def test_an_engine_is_built_as_asked_and_its_record_lets_it_pass_here(onnx_file: Path, tmp_path: Path, options: dict):
    gpu = present_gpu()
    assert gpu is not None
    if options.get("hardware_compatible") == "ampere-plus" and int(gpu.compute_capability[2:]) < 80:
        pytest.skip("a GPU before Ampere")
    engine, spec = tmp_path / "model.engine", EngineSpec(backend="tensorrt", max_batch=8, **options)
    engine_from_onnx(onnx_file, engine, spec)
    record = EngineRecord.of(spec, source="onnx/model-fp32.onnx", build_seconds=1.0)
    assert record.spec == spec
    assert record.why_not_here(tmp_path) is None
    assert record.why_rebuild("0.1", gpu) is not None
    with TensorRtRunner(engine, trusted=spec.version_compatible) as on_gpu, OnnxRunner(onnx_file) as on_cpu:
        images = random_images(3).numpy()
        np.testing.assert_allclose(on_gpu(images), on_cpu(images), rtol=1e-2, atol=1e-2)
    if spec.version_compatible:
        with pytest.raises(FloraError, match="does not load"):
            TensorRtRunner(engine)


def test_an_exported_engine_is_run_by_verify_and_rebuilt_in_place(tmp_path: Path):
    worked, bundle = worked_example(tmp_path / "worked"), tmp_path / "bundle"
    options = ("--to", "tensorrt", "--max-drop", 100, "--timing-cache", tmp_path / "timing", *QUICK)
    exported = flora("export", worked.compact, "--eval-data", worked.images, "-o", bundle, *options)
    assert exported.code == 0, exported
    for step in ((), ("--profile", "1,1,1", "--builder-level", 2)):
        if step:
            assert flora("export", bundle, "--rebuild-engine", *step).code == 0
        outcome = flora("verify", bundle, "--data", worked.images, "--threads", 1, "--json")
        found = json.loads(outcome.out)
        assert (outcome.code, found["passed"]) == (0, True), outcome
        assert found["engines"] == {"factorized, tensorrt": "verified"}
    engine = bundle / "engines" / "model-fp32-tensorrt.engine"
    engine.write_bytes(engine.read_bytes()[:1000])
    assert "is truncated, 1,000 of" in flora("verify", bundle).message


def test_an_engine_of_tensorrt_rtx_runs_where_its_gpu_is(onnx_file: Path, tmp_path: Path):
    gpu = present_gpu()
    if (
        importlib.util.find_spec("tensorrt_rtx") is None
        or gpu.compute_capability not in COMPUTE_CAPABILITIES["tensorrt-rtx"]
    ):
        pytest.skip("TensorRT-RTX is not installed, or knows no kernels for this GPU")
    engine = tmp_path / "model.engine"
    spec = EngineSpec(backend="tensorrt-rtx", max_batch=8, compute_capabilities=(gpu.compute_capability,))
    engine_from_onnx(onnx_file, engine, spec)
    record = EngineRecord.of(spec, source="onnx/model-fp32.onnx", build_seconds=1.0)
    assert record.why_rebuild(backend_version("tensorrt-rtx"), gpu) is None
    with TensorRtRunner(engine, backend="tensorrt-rtx") as on_gpu, OnnxRunner(onnx_file) as on_cpu:
        images = random_images(3).numpy()
        np.testing.assert_allclose(on_gpu(images), on_cpu(images), rtol=1e-2, atol=1e-2)


def test_an_engine_tells_which_attention_blocks_are_fused(onnx_file: Path, tmp_path: Path):
    engine, half = tmp_path / "model.engine", tmp_path / "half.onnx"
    half_onnx(onnx_file, half, "fp16")
    engine_from_onnx(half, engine, EngineSpec(backend="tensorrt", max_batch=8))
    found = attest_engine(engine, source=half)
    assert found.attention_blocks == len(attention_blocks(half)) > 0
    assert found.fused_attention is not None


def test_onnx_runtime_on_tensorrt_equals_the_cpu(onnx_file: Path):
    images = random_images(3).numpy()
    with open_runner("ort-tensorrt", onnx_file) as on_gpu, OnnxRunner(onnx_file) as on_cpu:
        assert on_gpu.provider == "TensorrtExecutionProvider"
        np.testing.assert_allclose(on_gpu(images), on_cpu(images), rtol=1e-2, atol=1e-2)
        on_gpu.bind(images)()


def test_an_int8_engine_multiplies_in_int8_and_computes_what_its_file_says(onnx_file: Path, tmp_path: Path):
    images = random_images(4).numpy()
    low, half, engine = (tmp_path / name for name in ("int8.onnx", "half.onnx", "model.engine"))
    quantize_onnx(onnx_file, low, measure_ranges(onnx_file, [images], "min-max"))
    half_onnx(low, half, "fp16")
    engine_from_onnx(half, engine, EngineSpec(backend="tensorrt", min_batch=1, opt_batch=4, max_batch=4))
    found = attest_engine(engine)
    assert found.shares["int8"] > 0.5
    assert "fp32" not in found.shares
    with TensorRtRunner(engine) as on_gpu, OnnxRunner(half) as on_cpu:
        assert compare(on_cpu(images), on_gpu(images)).cosine.min() > 0.99


@pytest.mark.parametrize("runtime", ["ort-cuda", "tensorrt", "torch-cuda"])
def test_a_latency_table_of_this_gpu_predicts_its_own_models(tmp_path: Path, runtime: str):
    model = load_model("vit_tiny_patch16_224", untrained=True)
    torch.set_num_threads(1)
    request = LatencyRequest(layers=("qkv", "proj", "fc1", "fc2"), runtime=runtime, batches=(8,), points=4)
    table = measure_latency(model, tmp_path / "latency.json", request)
    assert table.device["gpu"]
    assert table.device["driver"]
    assert max(map(abs, LatencyModel(table, batch=8).errors().values())) < 0.3
