"""The layer that is named is the one with the mistake, in every precision; sound files have none."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from export_samples import FAMILIES, GREY, random_images, tiny_model
from onnx import ModelProto, NodeProto, numpy_helper

from calibrate.basis import rewrite_basis
from calibrate.float8 import quantize_onnx_to_float8
from calibrate.half import half_onnx
from calibrate.mixed import products_but, products_by_layer, write_mixed
from calibrate.ranges import measure_ranges
from calibrate.static import quantize_onnx
from export import pieces
from export.departures import Departure, compare_files, first_departure
from export.images import LabelledImages
from export.onnx import onnx_from_module
from flora.errors import InputError
from flora.lowrank.checkpoint import load_model
from flora.lowrank.materialize import materialize
from flora.lowrank.supernet import build_supernet
from flora.lowrank.targets import find_targets, trace_cost
from tests.worked_example import FASHION

AS_WRITTEN = ("fp16", "int8-fp16", "fp8")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    settings = load_model(str(FASHION / "model")).config.preprocessing
    return next(LabelledImages(f"{FASHION / 'test.tar'},limit=8", settings).batches(8))[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained ViT at rank 48, in each precision; INT8 in a basis of its own, with two kinds of layers in FP32."""
    folder = tmp_path_factory.mktemp("departures")
    model = load_model(str(FASHION / "model"))
    settings = model.config.preprocessing
    calibration = [batch for batch, _ in LabelledImages(f"{FASHION / 'calibration.tar'},limit=32", settings).batches(16)]
    cost = trace_cost(model.module, find_targets(model.module), settings.input_size)
    build_supernet(model.module, cost, batches=[torch_tensor(batch) for batch in calibration])
    module = materialize(model.module, {layer.name: 48 for layer in cost.layers})
    found = {name: folder / f"{name}.onnx" for name in ("fp32", *AS_WRITTEN, "int8")}
    onnx_from_module(module, found["fp32"], preprocessing=settings)
    half_onnx(found["fp32"], found["fp16"], "fp16")
    rotated, whole, float8 = folder / "rotated.onnx", folder / "whole.onnx", folder / "float8.onnx"
    rewrite_basis(found["fp32"], rotated, calibration, "rotated")
    quantize_onnx(rotated, whole, measure_ranges(rotated, calibration, "min-max"))
    layers = products_by_layer(onnx.load(rotated), onnx.load(whole))
    write_mixed(rotated, whole, found["int8"], products_but(layers, ["head", "blocks.1.attn"]))
    half_onnx(whole, found["int8-fp16"], "fp16")
    quantize_onnx_to_float8(found["fp32"], float8, measure_ranges(found["fp32"], calibration, "min-max"))
    half_onnx(float8, found["fp8"], "fp16")
    return found
