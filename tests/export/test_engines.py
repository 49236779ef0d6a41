"""An engine is built on a machine without a GPU, or the reason why not names the cause."""

import importlib.util

import onnx
import pytest
from onnx import TensorProto, helper

from export.engines import EngineSpec, backend_version, engine_from_onnx
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
def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        engine_from_onnx(tmp_path / "none.onnx", tmp_path / "m.engine", RTX)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed")
def test_a_missing_backend_says_what_to_install(onnx_file, tmp_path):
    with pytest.raises(BackendMissingError, match=r"pip install 'flora-vit\[gpu\]'"):
        engine_from_onnx(onnx_file, tmp_path / "m.engine", EngineSpec(backend="tensorrt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tensorrt_rtx"}, "Did you mean tensorrt-rtx"),
        ({"min_batch": 4, "opt_batch": 2}, "4/2/64"),
        ({"min_batch": 0}, "0/8/64"),
        ({"max_batch": 4}, "1/8/4"),
        ({"workspace_mib": 0}, "at least 1 MiB"),
        ({"compute_capabilities": ("sm90",)}, "sm75, sm80.*got sm90"),
        ({"compute_capabilities": ()}, "got none"),
        ({"compute_capabilities": ("sm80", "sm80")}, "at most once"),
        ({"backend": "tensorrt", "compute_capabilities": ("sm80",)}, "GPU that is present"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        EngineSpec(**({"backend": "tensorrt-rtx"} | arguments))
