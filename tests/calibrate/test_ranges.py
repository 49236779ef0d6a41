"""Ranges: every image counts, however images are batched, and what cannot be calibrated on is refused by name."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibrate.ranges import METHODS, measure_ranges
from flora.errors import InputError


def ends(ranges) -> dict[str, np.ndarray]:
    return {name: np.ravel([np.asarray(end) for end in data.range_value]) for name, data in ranges.tensors.items()}


@pytest.mark.parametrize("method", METHODS)
def test_ranges_cover_the_input_and_every_product(fashion_onnx, calibration, method):
    ranges = measure_ranges(fashion_onnx, calibration, method)
    assert (ranges.method, ranges.images) == (method, 48)
    found = ends(ranges)
    products = [node for node in onnx.load(fashion_onnx).graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    assert {node.output[0] for node in products} | {"images"} <= set(found)
    for low, high in found.values():
        assert low < high
        assert method != "min-max" or low == -high


def test_batches_may_be_cut_anywhere(fashion_onnx, calibration):
    whole = np.concatenate(calibration)
    expected = ends(measure_ranges(fashion_onnx, [whole], "min-max"))
    for cut in (calibration, np.split(whole, [1, 30])):
        found = ends(measure_ranges(fashion_onnx, cut, "min-max"))
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_outlier_in_any_batch_moves_the_range(fashion_onnx, calibration, place):
    plain = ends(measure_ranges(fashion_onnx, calibration, "min-max"))["images"][1]
    planted = [batch.copy() for batch in calibration]
    planted[place][3, 0, 5:9, 5:9] = 40.0
    assert ends(measure_ranges(fashion_onnx, planted, "min-max"))["images"][1] == 40
    assert plain < 20


def test_percentiles_and_entropy_leave_the_rarest_values_out(fashion_onnx, calibration):
    every = ends(measure_ranges(fashion_onnx, calibration, "min-max"))
    for method in ("percentile", "entropy"):
        found = ends(measure_ranges(fashion_onnx, calibration, method))
        assert all(found[name][1] <= every[name][1] * 1.01 for name in every)
        assert sum(found[name][1] for name in every) < 0.99 * sum(high for _, high in every.values())


def test_what_cannot_be_calibrated_on_is_refused(fashion_onnx, calibration, tmp_path):
    with pytest.raises(InputError, match="There are no calibration images"):
        measure_ranges(fashion_onnx, [], "min-max")
    for value in (0.0, 0.7):
        with pytest.raises(InputError, match="of one and the same value"):
            measure_ranges(fashion_onnx, [np.full_like(calibration[0], value)] * 2, "min-max")
    with pytest.raises(InputError, match="Did you mean percentile"):
        measure_ranges(fashion_onnx, calibration, "percentil")


@pytest.mark.parametrize("method", METHODS)
def test_an_activation_that_is_no_number_is_named(fashion_onnx, calibration, tmp_path, method):
    model = onnx.load(fashion_onnx)
    bias = next(t for t in model.graph.initializer if t.name.endswith("blocks.3.mlp.fc1.bias"))
    bias.CopyFrom(numpy_helper.from_array(np.full(bias.dims[0], np.nan, np.float32), bias.name))
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(InputError, match=r"The activations of .* are not finite on a calibration image"):
        measure_ranges(tmp_path / "broken.onnx", calibration[:1], method)


def test_a_single_broken_image_is_not_overlooked(fashion_onnx, calibration):
    broken = [*calibration[:2], calibration[2].copy()]
    broken[2][5, 0, 3, 3] = np.nan
    with pytest.raises(InputError, match="are not finite on a calibration image"):
        measure_ranges(fashion_onnx, broken, "min-max")
