"""Targets are selected by name, traced once, and refused where the model does not call them."""

import pytest
import timm
from torch import nn

from flora.errors import InputError
from flora.lowrank.supernet import build_supernet
from flora.lowrank.targets import find_targets, trace_cost
from tests.samples import FAMILIES, IMAGE, PLAIN, SWIN, random_images, tiny_model

READS_WEIGHTS = {
    "beit": ("beit_base_patch16_224", PLAIN),
    "eva02": ("eva02_tiny_patch14_224", PLAIN),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
}


def _reads_weights(family: str) -> nn.Module:
    name, args = READS_WEIGHTS[family]
    return timm.create_model(name, in_chans=1, num_classes=10, **args).eval()


def test_the_papers_layers_are_the_default():
    kinds = {name.rsplit(".", 1)[-1] for name in find_targets(tiny_model())}
    assert kinds == {"qkv", "fc1", "fc2"}


def test_an_entry_selects_by_last_part():
    assert list(find_targets(tiny_model(), ["proj"])) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]


def test_an_entry_selects_by_pattern_over_the_whole_name():
    assert list(find_targets(tiny_model(), ["blocks.1.*.fc?"])) == ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]


def test_targets_come_in_the_models_order_whatever_the_entries():
    model = tiny_model()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    selected = list(find_targets(model, ["fc2", "fc1", "proj", "qkv"]))
    assert selected == [name for name in names if name != "head"]


def test_an_entry_that_selects_nothing_is_refused_with_the_kinds_there_are():
    with pytest.raises(InputError, match=r"fc3;.*fc1, fc2, head, proj, qkv"):
        find_targets(tiny_model(), ["qkv", "fc3"])


def test_an_empty_selection_is_refused():
    with pytest.raises(InputError, match="empty list"):
        find_targets(tiny_model(), [])


@pytest.mark.parametrize("family", READS_WEIGHTS)
def test_a_layer_whose_weight_is_read_is_refused_by_name(family: str):
    model = _reads_weights(family)
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.qkv.*--layers proj,fc1,fc2"):
        trace_cost(model, find_targets(model), IMAGE)


@pytest.mark.parametrize("family", READS_WEIGHTS)
def test_the_other_layers_of_such_a_model_can_be_factorized(family: str):
    model, images = _reads_weights(family), random_images(2)
    dense_logits = model(images)
    cost = trace_cost(model, find_targets(model, ["proj", "fc1", "fc2"]), IMAGE)
    build_supernet(model, cost, batches=[images])
    assert (model(images) - dense_logits).abs().max() < 1e-5


def test_tokens_of_a_vit_are_its_patches_and_the_class_token(vit_cost):
    assert {layer.tokens for layer in vit_cost.layers} == {7 * 7 + 1}


def test_tokens_of_a_swin_shrink_by_stage():
    model = tiny_model("swin")
    tokens = {name: shape.tokens for name, shape in trace_cost(model, find_targets(model), IMAGE).shapes.items()}
    assert {count for name, count in tokens.items() if name.startswith("layers.0.")} == {14 * 14}
    assert {count for name, count in tokens.items() if name.startswith("layers.1.")} == {7 * 7}


def test_padded_windows_count_as_tokens_of_the_attention_only():
    model = timm.create_model(FAMILIES["swin"][0], in_chans=1, **{**SWIN, "img_size": 20})
    shapes = trace_cost(model, find_targets(model), (1, 20, 20)).shapes
    assert shapes["layers.0.blocks.0.attn.qkv"].tokens == 14 * 14
    assert shapes["layers.0.blocks.0.mlp.fc1"].tokens == 10 * 10


def test_tracing_leaves_the_model_as_it_was():
    model = tiny_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace_cost(model, find_targets(model), IMAGE)
    assert model.training
    assert all((tensor == before[name]).all() for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
