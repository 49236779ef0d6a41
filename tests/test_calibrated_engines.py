"""Every file in low precision becomes an engine for every GPU that it is for, whatever the family."""

import importlib.util

import numpy as np
import pytest
import timm
import torch

from calibrate.float8 import quantize_onnx_to_float8
from calibrate.half import half_onnx
from calibrate.ranges import measure_ranges
from calibrate.static import quantize_onnx
from export.engines import EngineSpec, engine_from_onnx
from export.onnx import onnx_from_module
from flora.lowrank.materialize import materialize
from flora.lowrank.supernet import build_supernet
from flora.lowrank.targets import find_targets, trace_cost
from flora.preprocessing import Preprocessing

SETTINGS = Preprocessing(input_size=(3, 112, 112), mean=(0.5,) * 3, std=(0.5,) * 3)
FAMILIES = {
    "deit": ("deit_tiny_patch16_224", {"img_size": 112, "depth": 2}),
    "vit": ("vit_tiny_patch16_224", {"img_size": 112, "depth": 2}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 112, "depths": (1, 1), "num_heads": (3, 6)}),
}
EVERY_GPU = ("sm80", "sm86", "sm89", "sm120")
GPUS = {"int8-fp16": EVERY_GPU, "fp16": EVERY_GPU, "bf16": EVERY_GPU, "fp8": ("sm89", "sm120")}
pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="no tensorrt-rtx here")


@pytest.fixture(scope="module", params=FAMILIES)
def factorized(request, tmp_path_factory):
    """The file of a small model of one family at half of its ranks, and its ranges."""
    name, arguments = FAMILIES[request.param]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **arguments).eval()
    images = torch.randn(2, *SETTINGS.input_size)
    cost = trace_cost(model, find_targets(model), SETTINGS.input_size)
    build_supernet(model, cost, batches=[images])
    path = tmp_path_factory.mktemp(request.param) / "fp32.onnx"
    compact = materialize(model, {layer.name: layer.full_rank // 2 for layer in cost.layers})
    onnx_from_module(compact, path, preprocessing=SETTINGS)
    return path, measure_ranges(path, [np.asarray(images)], "min-max")


@pytest.mark.parametrize("precision", GPUS)
def test_it_is_built(factorized, tmp_path, precision):
    source, ranges = factorized
    low = tmp_path / f"{precision}.onnx"
    if precision in ("int8-fp16", "fp8"):
        quantize = quantize_onnx if precision == "int8-fp16" else quantize_onnx_to_float8
        quantize(source, tmp_path / "quantized.onnx", ranges)
        half_onnx(tmp_path / "quantized.onnx", low, "fp16")
    else:
        half_onnx(source, low, precision)
    spec = EngineSpec(backend="tensorrt-rtx", opt_batch=4, max_batch=8, compute_capabilities=GPUS[precision])
    engine_from_onnx(low, tmp_path / "m.engine", spec)
    assert (tmp_path / "m.engine").stat().st_size > low.stat().st_size
