"""Another basis between two factors: the same function and graph, equal channels, and less lost in INT8."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from calibrate.basis import METHODS, rewrite_basis
from calibrate.ranges import measure_ranges
from calibrate.static import quantize_onnx
from export.onnx import onnx_from_module
from flora import onnxfiles
from flora.errors import InputError
from flora.lowrank.checkpoint import load_model
from flora.lowrank.materialize import materialize
from flora.lowrank.supernet import build_supernet
from flora.lowrank.targets import find_targets, trace_cost
from flora.ranks.uniform import uniform_ranks_for_macs
from tests.calibrate.conftest import batches_of
from tests.worked_example import FASHION

LAYERS = ("qkv", "proj", "fc1", "fc2", "head")
BLOCKS = 6


@pytest.fixture(scope="module")
def factorized(tmp_path_factory) -> Path:
    """The example's ViT at 20 % of its MACs, its head in two factors as well."""
    loaded = load_model(str(FASHION / "model"))
    cost = trace_cost(loaded.module, find_targets(loaded.module, LAYERS), loaded.config.preprocessing.input_size)
    images = [torch.from_numpy(batch) for batch in batches_of("calibration.tar", 96)]
    build_supernet(loaded.module, cost, batches=images)
    ranks = uniform_ranks_for_macs(cost, cost.dense_macs // 5)
    compact = materialize(loaded.module, {**ranks, "head": 6})
    path = tmp_path_factory.mktemp("basis") / "factorized.onnx"
    onnx_from_module(compact, path, preprocessing=loaded.config.preprocessing)
    return path


@pytest.fixture(scope="module", params=METHODS)
def rewritten(request, factorized, calibration, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewritten") / "basis.onnx"
    rewrite_basis(factorized, path, calibration, request.param)
    return path


def outputs(path: Path, images: np.ndarray, names: list[str] | None = None) -> list[np.ndarray]:
    """As the file says, without the runtime's INT8 kernels: those of CPUs without VNNI saturate."""
    model = onnx.load(path)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names or [])
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(names or None, {"images": images})


def inner_activations(path: Path) -> list[str]:
    """What one product by a constant hands to the next, by its own look at the graph."""
    graph = onnx.load(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    products = [n for n in graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in constants]
    return [node.output[0] for node in products if any(node.output[0] == other.input[0] for other in products)]


def weights(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_the_function_stays(factorized, rewritten, test_images):
    before, after = outputs(factorized, test_images)[0], outputs(rewritten, test_images)[0]
    assert np.abs(after - before).max() < 1e-4 * np.abs(before).max()


def test_only_the_weights_of_factors_change(factorized, rewritten):
    before, after = weights(factorized), weights(rewritten)
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert len(inner_activations(factorized)) == 4 * BLOCKS + 1
    assert len(changed) == 2 * len(inner_activations(factorized))
    assert {name: (value.shape, value.dtype) for name, value in before.items()} == {
        name: (value.shape, value.dtype) for name, value in after.items()
    }
    models = [onnx.load(path) for path in (factorized, rewritten)]
    for model in models:
        del model.graph.initializer[:]
    assert models[0] == models[1]


@pytest.mark.parametrize("method", [method for method in METHODS if "rotated" in method])
def test_rotated_channels_have_one_spread(factorized, calibration, tmp_path, method):
    rewrite_basis(factorized, tmp_path / "basis.onnx", calibration, method)
    images, names = np.concatenate(calibration), inner_activations(factorized)

    def unevenness(path: Path) -> list[float]:
        squares = [np.square(h.reshape(-1, h.shape[-1])).mean(0) for h in outputs(path, images, names)]
        return [square.max() / square.min() for square in squares]

    assert np.median(unevenness(factorized)) > 20
    assert max(unevenness(tmp_path / "basis.onnx")) < 1.001


def sqnr_db(path: Path, calibration, images, folder: Path) -> float:
    """How far the logits of the file lie above what INT8 adds to them."""
    quantize_onnx(path, folder / "int8.onnx", measure_ranges(path, calibration, "min-max"))
    exact, coarse = outputs(path, images)[0], outputs(folder / "int8.onnx", images)[0]
    return 10 * np.log10(np.square(exact).sum() / np.square(coarse - exact).sum())


@pytest.fixture(scope="module")
def sqnr_before_db(factorized, calibration, test_images, tmp_path_factory) -> float:
    return sqnr_db(factorized, calibration, test_images, tmp_path_factory.mktemp("before"))


def test_less_is_lost_in_int8(rewritten, sqnr_before_db, calibration, test_images, tmp_path):
    assert sqnr_db(rewritten, calibration, test_images, tmp_path) > sqnr_before_db + 0.5


def test_a_dense_file_stays_as_it_is(fashion_onnx, calibration, tmp_path):
    for method in METHODS:
        rewrite_basis(fashion_onnx, tmp_path / "basis.onnx", calibration, method)
        assert onnx.load(tmp_path / "basis.onnx") == onnx.load(fashion_onnx)


def test_weights_too_large_for_one_file_lie_beside_it(factorized, calibration, tmp_path, monkeypatch):
    method = next(iter(METHODS))
    rewrite_basis(factorized, tmp_path / "whole.onnx", calibration, method)
    source = tmp_path / "source" / "model.onnx"
    source.parent.mkdir()
    onnx.save(onnx.load(factorized), source, save_as_external_data=True, location="model.onnx.data")
    monkeypatch.setattr(onnxfiles, "LARGEST_INLINE_BYTES", 0)
    for _ in range(2):  # over what is there, too
        rewrite_basis(source, tmp_path / "basis.onnx", calibration, method)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.onnx", "source", "basis.onnx", "basis.onnx.data"}
    assert (tmp_path / "basis.onnx").stat().st_size < 0.2 * factorized.stat().st_size
    assert (tmp_path / "basis.onnx.data").stat().st_size < 1.1 * factorized.stat().st_size
    whole, split = weights(tmp_path / "whole.onnx"), weights(tmp_path / "basis.onnx")
    assert all(np.array_equal(whole[name], split[name]) for name in whole)


def test_batches_may_be_cut_anywhere(factorized, calibration, tmp_path):
    method = list(METHODS)[-1]
    whole = np.concatenate(calibration)
    for name, batches in (("whole", [whole]), ("cut", np.split(whole, [1, 30]))):
        rewrite_basis(factorized, tmp_path / name, iter(batches), method)
    whole_weights, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for name, value in whole_weights.items():
        np.testing.assert_allclose(cut[name], value, atol=1e-3 * np.abs(value).max())


def test_what_cannot_be_used_is_refused(factorized, calibration, tmp_path):
    out = tmp_path / "basis.onnx"
    with pytest.raises(InputError, match="Did you mean rotated"):
        rewrite_basis(factorized, out, calibration, "rotate")
    with pytest.raises(InputError, match="There are no calibration images"):
        rewrite_basis(factorized, out, [], "rotated")
    with pytest.raises(InputError, match=r"The activations of .* and \d+ more are not finite"):
        rewrite_basis(factorized, out, [np.full_like(calibration[0], np.nan)], "rotated")
    quantize_onnx(factorized, tmp_path / "int8.onnx", measure_ranges(factorized, calibration, "min-max"))
    with pytest.raises(InputError, match="is quantized already"):
        rewrite_basis(tmp_path / "int8.onnx", out, calibration, "rotated")
    assert not out.exists()
