"""The layer that is named is the one with the mistake, in every precision; sound files have none."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_samples import FAMILIES, GREY, random_images, tiny_model
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

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
    calibration = [
        batch for batch, _ in LabelledImages(f"{FASHION / 'calibration.tar'},limit=32", settings).batches(16)
    ]
    cost = trace_cost(model.module, find_targets(model.module), settings.input_size)
    build_supernet(model.module, cost, batches=[torch.from_numpy(batch) for batch in calibration])
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


def compared(files: dict[str, Path], precision: str, images: np.ndarray, suspect: Path | None = None):
    return compare_files(
        files["fp32"], suspect or files[precision], images, threads=1, as_written=precision in AS_WRITTEN
    )


def product(model: ModelProto, layer: str) -> NodeProto:
    """The last product of a layer."""
    return [
        node
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm", "Conv")
        and any(f"'{layer}" in entry.value for entry in node.metadata_props)
    ][-1]


def constant(model: ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def multiply(model: ModelProto, name: str, factor: float | np.ndarray) -> None:
    """Change a constant of the model in place."""
    values = numpy_helper.to_array(constant(model, name))
    changed = (values.astype(np.float32) * factor).astype(values.dtype)
    constant(model, name).CopyFrom(numpy_helper.from_array(changed, name))


def conversion(model: ModelProto, layer: str, which: int) -> NodeProto:
    """What dequantizes an input of a layer's last product: 0 is the activation, 1 the weight."""
    name = product(model, layer).input[which]
    return next(node for node in model.graph.node if name in node.output)


def saved(model: ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def flip_weight(model: ModelProto, layer: str) -> None:
    """The sign of the last weight of a layer, by its scale where it is quantized."""
    name = product(model, layer).input[1]
    is_plain = any(tensor.name == name for tensor in model.graph.initializer)
    multiply(model, name if is_plain else conversion(model, layer, 1).input[1], -1)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-fp16", "fp8"])
def test_no_layer_of_a_sound_file_departs(files, images, precision):
    found = compared(files, precision, images)
    assert found.departures == ()
    assert found.images == 8
    assert found.layers > 60
    assert found.logits_db > 15
    assert first_departure(files["fp32"], files["fp32"], images, threads=1) is None


# By weights of FP32 that are as right as before, which FP16 can hold: what is multiplied, and what makes up for it.
OVERFLOWS = {
    "values of attention": ("blocks.3.attn.qkv", "blocks.3.attn.qkv", "blocks.3.attn.proj"),
    "a normalization": ("blocks.4.norm2", "blocks.4.norm2", "blocks.4.mlp.fc1.down"),
    "between two factors": ("blocks.2.mlp.fc1", "blocks.2.mlp.fc1.down", "blocks.2.mlp.fc1.up"),
}


@pytest.mark.parametrize("place", OVERFLOWS)
def test_an_overflow_of_fp16_is_named_though_onnx_runtime_hides_it(files, images, tmp_path, place):
    layer, raised, lowered = OVERFLOWS[place]
    model = onnx.load(files["fp32"])
    factor = 20_000.0 if place == "values of attention" else 60_000.0
    if place == "values of attention":
        only_values = np.where(np.arange(576) < 384, 1, factor).astype(np.float32)
        multiply(model, product(model, raised).input[1], only_values)
        multiply(model, f"{raised}.up.bias", only_values)
    elif place == "a normalization":
        multiply(model, f"{raised}.weight", factor)
        multiply(model, f"{raised}.bias", factor)
    else:
        multiply(model, product(model, raised).input[1], factor)
    multiply(model, product(model, lowered).input[1], 1 / factor)
    sound = saved(model, tmp_path / "fp32.onnx")
    half_onnx(sound, tmp_path / "fp16.onnx", "fp16")
    assert compared(files, "fp32", images, sound).logits_db > 80
    found = compare_files(sound, tmp_path / "fp16.onnx", images, threads=1, as_written=True)
    assert [(one.layer, one.kind) for one in found.departures] == [(layer, "overflow")]
    assert found.departures[0].entering_db > 60
    largest = found.departures[0].largest
    assert largest is None if place == "between two factors" else largest > 65504


@pytest.mark.parametrize("precision", ["int8", "int8-fp16"])
@pytest.mark.parametrize("layer", ["patch_embed.proj", "blocks.0.attn.proj", "blocks.2.attn.qkv", "blocks.5.mlp.fc2"])
def test_a_scale_of_an_activation_that_is_four_times_too_large_is_named(files, images, tmp_path, precision, layer):
    model = onnx.load(files[precision])
    multiply(model, conversion(model, layer, 0).input[1], 4)
    found = compared(files, precision, images, saved(model, tmp_path / "scaled.onnx"))
    assert [(one.layer, one.kind) for one in found.departures] == [(layer, "scale")]
    assert 3.5 < found.departures[0].steps_ratio < 8


@pytest.mark.parametrize("precision", ["int8", "int8-fp16", "fp8"])
@pytest.mark.parametrize("layer", ["blocks.0.attn.proj", "blocks.2.attn.qkv", "blocks.5.mlp.fc2"])
def test_scales_of_weights_that_are_four_times_too_large_are_named(files, images, tmp_path, precision, layer):
    model = onnx.load(files[precision])
    multiply(model, conversion(model, layer, 1).input[1], 4)
    found = compared(files, precision, images, saved(model, tmp_path / "scaled.onnx"))
    assert [(one.layer, one.kind) for one in found.departures] == [(layer, "weights")]
    assert found.departures[0].own_db == pytest.approx(-9.5, abs=0.3)  # an error of three times the signal
    assert found.departures[0].operator == "MatMul"
    assert found.departures[0].node == product(model, layer).name


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "fp8"])
def test_a_weight_with_the_wrong_sign_is_named_and_no_later_layer_blamed(files, images, tmp_path, precision):
    model = onnx.load(files[precision])
    flip_weight(model, "blocks.1.attn.proj")
    found = compared(files, precision, images, saved(model, tmp_path / "flipped.onnx"))
    assert [(one.layer, one.kind) for one in found.departures] == [("blocks.1.attn.proj", "weights")]
    assert found.departures[0].entering_db > found.departures[0].leaving_db + 20
    assert found.logits_db < 10


@pytest.mark.parametrize("name", ["blocks.4.norm1.weight", "blocks.2.mlp.fc1.up.bias", "patch_embed.proj.weight"])
def test_any_weight_with_the_wrong_sign_is_named(files, images, tmp_path, name):
    model = onnx.load(files["fp16"])
    multiply(model, name, -1)
    found = compared(files, "fp16", images, saved(model, tmp_path / "flipped.onnx"))
    assert [one.layer for one in found.departures] == [name.rpartition(".")[0].removesuffix(".up")]


def test_one_channel_of_a_quantized_weight_is_enough(files, images, tmp_path):
    model = onnx.load(files["int8"])
    scale = conversion(model, "blocks.3.attn.proj", 1).input[1]
    multiply(model, scale, np.where(np.arange(constant(model, scale).dims[0]) == 5, 4, 1))
    found = compared(files, "int8", images, saved(model, tmp_path / "channel.onnx"))
    assert [(one.layer, one.kind) for one in found.departures] == [("blocks.3.attn.proj", "weights")]


def test_of_two_layers_the_first_is_named_and_both_are_listed(files, images, tmp_path):
    model = onnx.load(files["int8"])
    for layer in ("blocks.4.attn.qkv", "blocks.2.mlp.fc2"):
        flip_weight(model, layer)
    twice = saved(model, tmp_path / "twice.onnx")
    found = first_departure(files["fp32"], twice, images, threads=1)
    assert isinstance(found, Departure)
    assert found.layer == "blocks.2.mlp.fc2"
    layers = [one.layer for one in compared(files, "int8", images, twice).departures]
    assert layers == ["blocks.2.mlp.fc2", "blocks.4.attn.qkv"]


def test_a_weight_that_is_no_number_is_told_from_an_overflow(files, images, tmp_path):
    model = onnx.load(files["fp16"])
    multiply(model, product(model, "blocks.1.mlp.fc2").input[1], np.nan)
    found = compared(files, "fp16", images, saved(model, tmp_path / "nan.onnx"))
    assert [(one.layer, one.kind) for one in found.departures] == [("blocks.1.mlp.fc2", "not finite")]


@pytest.mark.parametrize("family", ["deit3", "swin"])
def test_layers_of_other_families_are_named(family, tmp_path):
    onnx_from_module(tiny_model(family), tmp_path / "fp32.onnx", preprocessing=GREY)
    half_onnx(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx", "fp16")
    images, layer = random_images(2), {"deit3": "blocks.1.mlp.fc1", "swin": "layers.1.blocks.0.mlp.fc1"}[family]
    assert family in FAMILIES
    assert first_departure(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx", images, threads=1, as_written=True) is None
    model = onnx.load(tmp_path / "fp16.onnx")
    flip_weight(model, layer)
    found = compare_files(
        tmp_path / "fp32.onnx", saved(model, tmp_path / "flipped.onnx"), images, threads=1, as_written=True
    )
    assert [one.layer for one in found.departures] == [layer]


def test_weights_beside_the_file_are_found(files, images, tmp_path):
    model = onnx.load(files["fp16"])
    flip_weight(model, "blocks.5.attn.proj")
    beside = tmp_path / "beside.onnx"
    onnx.save(model, beside, save_as_external_data=True, location="beside.onnx.data")
    assert first_departure(files["fp32"], beside, images, threads=1, as_written=True).layer == "blocks.5.attn.proj"


def test_tensors_held_at_once_stay_within_the_bound_whatever_the_images(files, images, monkeypatch):
    passes: list[tuple[int, int]] = []
    compare = pieces.Comparer._pass

    def watched(self, images: np.ndarray) -> int:
        passes.append((len(images), compare(self, images)))
        return passes[-1][1]

    monkeypatch.setattr(pieces.Comparer, "_pass", watched)
    compared(files, "int8", images[:1])
    ((_, of_one),) = passes
    passes.clear()
    monkeypatch.setattr(pieces, "BYTES_AT_ONCE", bound := int(3.5 * of_one))
    compared(files, "int8", images)
    assert [count for count, _ in passes] == [1, 3, 3, 1]
    assert max(held for _, held in passes) <= bound


def test_figures_do_not_depend_on_how_many_images_are_held(files, images, tmp_path, monkeypatch):
    model = onnx.load(files["int8"])
    flip_weight(model, "blocks.3.mlp.fc2")
    path = saved(model, tmp_path / "flipped.onnx")
    together = compared(files, "int8", images, path)
    monkeypatch.setattr(pieces, "BYTES_AT_ONCE", 1)
    alone = compared(files, "int8", images, path)
    assert alone.departures[0].own_db == pytest.approx(together.departures[0].own_db, abs=1e-6)
    assert [one.layer for one in alone.departures] == [one.layer for one in together.departures]


def test_what_cannot_be_compared_is_refused(files, images, tmp_path):
    with pytest.raises(InputError, match="There are no images"):
        first_departure(files["fp32"], files["fp16"], images[:0])
    content = files["fp16"].read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cut\.onnx is no complete ONNX file"):
        first_departure(files["fp32"], tmp_path / "cut.onnx", images)
    with pytest.raises(InputError, match=r"none\.onnx is no complete ONNX file"):
        first_departure(files["fp32"], tmp_path / "none.onnx", images)
    model = onnx.load(files["fp32"])
    multiply(model, "blocks.0.norm1.weight", np.nan)
    with pytest.raises(InputError, match="values that are not finite"):
        first_departure(saved(model, tmp_path / "nan.onnx"), files["fp16"], images)


def test_files_of_two_models_are_refused(files, images, onnx_file):
    with pytest.raises(InputError, match="two files of the same model"):
        first_departure(files["fp32"], onnx_file, images, threads=1)
