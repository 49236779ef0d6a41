"""What a bundle says of the inside of its model adds up to the whole: MACs by part, and layer by layer."""

import json

import pytest

from flora.lowrank.checkpoint import LoadedModel, ModelConfig
from flora.lowrank.materialize import materialize
from flora.lowrank.pivot import pivot_layers
from flora.lowrank.targets import trace_cost
from flora.pipeline.parts import layer_entries, macs_by_part
from flora.pipeline.proof import Exported
from flora.ranks.sensitivity import LayerSensitivity
from tests.samples import FAMILIES, GREY, random_ranks, tiny_args, tiny_model


def exported(module, ranks=None) -> Exported:
    config = ModelConfig(model=FAMILIES["vit"][0], args=tiny_args(), preprocessing=GREY, ranks=ranks or {})
    model = LoadedModel(module=module, config=config)
    return Exported(name="m", runtime="ort-cpu", role="candidate", model=model, path="m.onnx", module=module)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_macs_of_all_parts_are_those_of_the_model(family):
    module = tiny_model(family)
    parts = macs_by_part(exported(module))
    assert sum(parts.values()) == trace_cost(module, [], GREY.input_size).dense_macs
    assert {"patch embedding", "qkv", "attention", "proj", "fc1", "fc2", "head"} <= parts.keys()
    assert ("reduction" in parts) == (family == "swin")


def test_the_macs_of_layers_are_what_their_part_has(supernet, vit_cost):
    ranks = random_ranks(vit_cost, 3)
    chosen = [name for name, rank in ranks.items() if rank != "dense"][:2]
    module = materialize(supernet, ranks, chosen)
    assert pivot_layers(module, chosen) == []
    config = exported(module, ranks).model.config.model_copy(update={"pivoted": tuple(chosen)})
    dense = LoadedModel(module=tiny_model("vit"), config=config)
    layers = layer_entries(config, dense, not_pivoted=[], probes={})
    parts = macs_by_part(exported(module))
    for kind in ("qkv", "fc1", "fc2"):
        assert sum(layer.macs for layer in layers if layer.name.endswith(kind)) == parts[kind]
    assert {layer.name for layer in layers if layer.is_pivoted} == set(chosen)
    assert [layer.name for layer in layers] == [shape.name for shape in vit_cost.layers]


def test_without_the_dense_model_layers_are_the_same(supernet, vit_cost):
    config = exported(supernet, random_ranks(vit_cost, 0)).model.config
    dense = LoadedModel(module=tiny_model("vit"), config=config)
    probes = {vit_cost.layers[0].name: LayerSensitivity(rank=6, divergence=0.25)}
    found = layer_entries(config, None, not_pivoted=[], probes=probes)
    assert found == layer_entries(config, dense, not_pivoted=[], probes=probes)
    assert (found[0].probe_rank, found[0].sensitivity, found[1].sensitivity) == (6, 0.25, None)


def test_a_bundle_says_where_macs_and_time_go(worked):
    dense, factorized = (entry for entry in worked.manifest["artifacts"] if entry["kind"] == "onnx")
    for entry in (dense, factorized):
        assert sum(part["macs"] for part in entry["parts"].values()) == entry["macs"]
        assert sum(part["time_share"] for part in entry["parts"].values()) == pytest.approx(1)
    saved = sum(layer["dense_macs"] - layer["macs"] for layer in worked.manifest["layers"])
    assert dense["macs"] - factorized["macs"] == saved > 0


def test_the_bundle_of_a_compressed_model_has_the_sensitivity_of_each_layer(worked):
    """And it is what was measured, in the folder of the steps."""
    manifest = json.loads((worked.compressed / "manifest.json").read_text())
    measured = json.loads((worked.compressed.with_name("compress.work") / "sensitivity/sensitivity.json").read_text())
    found = {layer["name"]: (layer["probe_rank"], layer["sensitivity"]) for layer in manifest["layers"]}
    assert found == {name: (probe["rank"], probe["divergence"]) for name, probe in measured["probes"].items()}
    assert len(found) == 8
