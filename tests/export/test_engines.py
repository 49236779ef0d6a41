"""An engine is built on a machine without a GPU, or the reason why not names the cause."""

import importlib.util
from dataclasses import replace

import onnx
import pytest
from onnx import TensorProto, helper

from export.engine_spec import EngineSpec
from export.engines import backend_module, backend_version, build_advice, collecting_logger, engine_from_onnx
from flora.errors import BackendMissingError, FloraError, InputError

RTX = EngineSpec(backend="tensorrt-rtx", opt_batch=4, max_batch=8, compute_capabilities=("sm89",))
needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="no tensorrt-rtx here")


@needs_rtx
def test_an_engine_is_built_without_a_gpu(onnx_file, tmp_path):
    engine_from_onnx(onnx_file, tmp_path / "m.engine", RTX)
    assert (tmp_path / "m.engine").stat().st_size > 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["m.engine"]
    assert backend_version("tensorrt-rtx")[0].isdigit()


@needs_rtx
def test_all_usual_gpus_are_meant_unless_named(onnx_file, tmp_path):
    spec = EngineSpec(backend="tensorrt-rtx", workspace_mib=512)
    assert spec.compute_capabilities == ("sm80", "sm86", "sm89", "sm120")
    engine_from_onnx(onnx_file, tmp_path / "m.engine", spec)
    assert (tmp_path / "m.engine").stat().st_size > 100_000


@needs_rtx
def test_an_operator_that_is_not_supported_is_named(tmp_path):
    value = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 4])
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])
    node = helper.make_node("Imagined", ["images"], ["logits"], name="the_node", domain="elsewhere")
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("elsewhere", 1)]
    onnx.save(helper.make_model(helper.make_graph([node], "g", [value], [out]), opset_imports=imports), tmp_path / "m")
    with pytest.raises(InputError, match=r"operator Imagined \(node the_node\)"):
        engine_from_onnx(tmp_path / "m", tmp_path / "m.engine", RTX)
    assert not (tmp_path / "m.engine").exists()


@needs_rtx
@pytest.mark.parametrize("content", [b"", b"not onnx", None])
def test_a_corrupt_file_is_refused(onnx_file, tmp_path, content):
    path = tmp_path / "bad.onnx"
    path.write_bytes(onnx_file.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(InputError, match=r"bad\.onnx cannot become an engine: ."):
        engine_from_onnx(path, tmp_path / "m.engine", RTX)


@needs_rtx
def test_a_fixed_batch_must_be_the_profile(onnx_file, tmp_path):
    model = onnx.load(onnx_file)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / "fixed.onnx")
    with pytest.raises(FloraError, match="fixed batch of 2"):
        engine_from_onnx(tmp_path / "fixed.onnx", tmp_path / "m.engine", RTX)


@needs_rtx
def test_each_build_tells_its_own_errors(onnx_file, tmp_path):
    """While another builder lives, the library goes on with the logger that it began with."""
    trt = backend_module("tensorrt-rtx")
    alive = trt.Builder(collecting_logger(trt))
    (tmp_path / "bad.onnx").write_bytes(b"not onnx")
    with pytest.raises(InputError, match=r"bad\.onnx cannot become an engine"):
        engine_from_onnx(tmp_path / "bad.onnx", tmp_path / "m.engine", RTX)
    with pytest.raises(FloraError, match=r"within workspace limit.*The workspace of 1 MiB is too small"):
        engine_from_onnx(onnx_file, tmp_path / "m.engine", replace(RTX, workspace_mib=1))
    assert alive


@needs_rtx
def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        engine_from_onnx(tmp_path / "none.onnx", tmp_path / "m.engine", RTX)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed")
def test_a_missing_backend_says_what_to_install(onnx_file, tmp_path):
    with pytest.raises(BackendMissingError, match=r"pip install 'flora-vit\[gpu\]'"):
        engine_from_onnx(onnx_file, tmp_path / "m.engine", EngineSpec(backend="tensorrt"))


@needs_rtx
def test_each_profile_is_built(onnx_file, tmp_path):
    sizes = []
    for more in ((), ((1, 1, 1),)):
        engine_from_onnx(onnx_file, tmp_path / "m.engine", replace(RTX, more_profiles=more))
        sizes.append((tmp_path / "m.engine").stat().st_size)
    assert sizes[1] > 1.2 * sizes[0]


@needs_rtx
def test_a_workspace_that_is_too_small_is_said(onnx_file, tmp_path):
    with pytest.raises(FloraError, match=r"The workspace of 1 MiB is too small: give more"):
        engine_from_onnx(onnx_file, tmp_path / "m.engine", replace(RTX, workspace_mib=1))
    assert not (tmp_path / "m.engine").exists()


# What TensorRT said in NVIDIA/TensorRT issues 477, 2643 and 948, and DeepStream-Yolo 366.
@pytest.mark.parametrize(
    "message",
    [
        "tacticOptimizer.cpp (1523) - OutOfMemory Error in nvinfer1::builder::LeafCNode::computeCosts: 0",
        "[virtualMemoryBuffer.cpp::resizePhysical::145] Error Code 2: OutOfMemory (no further information)",
        "Cuda Error in nvinfer1::internal::DefaultAllocator::allocate: 2 (out of memory)",
        "Requested amount of GPU memory (4294967296 bytes) could not be allocated.",
        "Skipping tactic 3 due to insufficient memory on requested size of 4294967296",
    ],
)
def test_a_lack_of_memory_is_recognised_and_answered(message):
    spec = EngineSpec(backend="tensorrt", workspace_mib=4096, more_profiles=((1, 1, 1),))
    unspecific = "Could not find any implementation for node /patch_embed/proj/Conv."
    advice = build_advice([unspecific, message], spec)
    assert "not enough memory: lower the workspace (now 4096 MiB) or the largest batch (profiles 1/8/64 and" in advice
    assert "memory" not in build_advice([unspecific], spec)
