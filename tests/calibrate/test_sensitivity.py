"""Sensitivity: a layer that quantizes badly stands first, and the fewest layers go back."""

import math

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibrate.mixed import products_by_layer, write_mixed
from calibrate.ranges import measure_ranges
from calibrate.sensitivity import EXACT_DB, LayerError, fewest, layer_errors, order_of_return, sqnr_db
from calibrate.static import quantize_onnx
from flora.errors import InputError


def test_a_broken_scale_puts_its_layer_first(fashion_onnx, calibration, test_images, tmp_path):
    quantize_onnx(fashion_onnx, tmp_path / "whole.onnx", measure_ranges(fashion_onnx, calibration, "min-max"))
    layers = products_by_layer(onnx.load(fashion_onnx), onnx.load(tmp_path / "whole.onnx"))
    last = [name for layer, names in layers.items() if layer.startswith(("blocks.4", "head")) for name in names]
    write_mixed(fashion_onnx, tmp_path / "whole.onnx", tmp_path / "int8.onnx", last)
    sound = layer_errors(fashion_onnx, tmp_path / "int8.onnx", test_images[:8])
    model, source = onnx.load(tmp_path / "int8.onnx"), onnx.load(fashion_onnx)
    assert {error.layer for error in sound} == set(products_by_layer(source, model))
    assert len(sound) == 6
    assert [error.sqnr_db for error in sound] == sorted(error.sqnr_db for error in sound)
    product = products_by_layer(source, model)["blocks.4.mlp.fc2"][0]
    weight = next(node for node in model.graph.node if node.name == product).input[1]
    scale = next(t for t in model.graph.initializer if t.name == weight.replace("_DequantizeLinear_Output", "_scale"))
    scale.CopyFrom(numpy_helper.from_array(4 * numpy_helper.to_array(scale), scale.name))
    onnx.save(model, tmp_path / "broken.onnx")
    first, second = layer_errors(fashion_onnx, tmp_path / "broken.onnx", test_images[:8])[:2]
    assert first.layer == "blocks.4.mlp.fc2"
    assert first.sqnr_db < second.sqnr_db - 3


def test_what_cannot_be_measured_is_refused(fashion_onnx, test_images):
    with pytest.raises(InputError, match="nothing in low precision"):
        layer_errors(fashion_onnx, fashion_onnx, test_images[:1])
    with pytest.raises(InputError, match="There are no images"):
        layer_errors(fashion_onnx, fashion_onnx, test_images[:0])


def test_decibels():
    logits = np.array([[3.0, 4.0]])
    assert sqnr_db(logits, logits + np.array([0.5, 0.0])) == pytest.approx(20)
    assert sqnr_db(logits, logits) == EXACT_DB
    assert sqnr_db(logits, np.array([[np.nan, 4.0]])) == -EXACT_DB


def test_layers_go_back_by_error_for_the_time_that_it_costs():
    errors = [LayerError(layer=name, products=1, sqnr_db=db) for name, db in (("a", 20), ("b", 21), ("c", 40))]
    assert order_of_return(errors, {"a": 1.0, "b": 1.0, "c": 1.0}) == ["a", "b", "c"]
    assert order_of_return(errors, {"a": 9.0, "b": 1.0, "c": 0.0}) == ["c", "b", "a"]


@pytest.mark.parametrize("needed", [0, 1, 6, 49, 50])
def test_the_fewest_layers_are_found_in_few_looks(needed):
    looks = []
    assert fewest(50, lambda count: looks.append(count) or count >= needed) == needed
    assert len(looks) <= math.ceil(math.log2(51))
    assert 50 not in looks
