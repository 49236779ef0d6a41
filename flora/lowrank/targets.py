"""Which linear layers of a timm model are factorized, and what each costs.

The paper factorizes `qkv`, `fc1` and `fc2` of every block. A traced pass over one image gives the tokens of each
layer and the MACs of the whole model; it also finds layers whose weight is read instead of the layer being called
(BEiT, EVA-02 and Swin-V2 do so with `qkv`): replacing those would change nothing or break, so they are refused.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flora.errors import InputError, few
from flora.ranks.cost import LayerShape, ModelCost

PAPER_LAYERS = ("qkv", "fc1", "fc2")


def find_targets(model: nn.Module, layers: Sequence[str] = PAPER_LAYERS) -> dict[str, nn.Linear]:
    """The linear layers that `layers` selects, by name, in the model's order.

    An entry of `layers` is the last part of a layer's name (`qkv`), or a pattern over the whole name
    (`blocks.*.attn.proj`). Raises `InputError` when an entry selects nothing.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unmatched = [entry for entry in layers if not any(_selects(entry, name) for name in linears)]
    if unmatched or not layers:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise InputError(
            f"No linear layer is selected by {few(unmatched) or 'an empty list'}; "
            f"this model's linear layers end in {few(kinds, 20) or '(it has none)'}."
        )
    return {name: module for name, module in linears.items() if any(_selects(entry, name) for entry in layers)}


def linear_layers(model: nn.Module, names: Collection[str]) -> dict[str, nn.Linear]:
    """The modules called `names`, which must be linear layers of `model`; else `InputError`."""
    modules = dict(model.named_modules())
    if wrong := [name for name in names if not isinstance(modules.get(name), nn.Linear)]:
        raise InputError(f"The model has no linear layer {few(wrong)}.")
    return {name: cast(nn.Linear, modules[name]) for name in names}


def _selects(entry: str, name: str) -> bool:
    return fnmatchcase(name, entry) or name.rsplit(".", 1)[-1] == entry


@torch.inference_mode()
def trace_cost(model: nn.Module, targets: Collection[str], input_size: tuple[int, int, int]) -> ModelCost:
    """Count one pass over one image of `input_size` (channels, height, width) of the dense model.

    Attention is counted in its explicit form, since torch's counter does not see fused kernels on a CPU.
    """
    layers = linear_layers(model, targets)
    tokens: Counter[str] = Counter()

    def count_tokens(name: str):
        return lambda module, inputs: tokens.update({name: inputs[0].numel() // module.in_features})

    hooks = [layer.register_forward_pre_hook(count_tokens(name)) for name, layer in layers.items()]
    try:
        counter = _counted(model, input_size)
    finally:
        for hook in hooks:
            hook.remove()
    if bypassed := [name for name in layers if not tokens[name]]:
        block = bypassed[0].rsplit(".", 2)[0] + "."
        beside = [name.rsplit(".", 1)[-1] for name in find_targets(model, [f"{block}*"]) if name not in bypassed]
        others = dict.fromkeys(kind for kind in beside if not kind.isdigit())
        raise InputError(
            f"This model does not call {few(bypassed)}: it reads the weight itself, so the layer cannot be "
            f"replaced. Select other layers, for example --layers {','.join(others)}."
        )
    shapes = tuple(
        LayerShape(name=name, in_features=layer.in_features, out_features=layer.out_features, tokens=tokens[name])
        for name, layer in layers.items()
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelCost(
        layers=shapes,
        fixed_macs=counter.get_total_flops() // 2 - sum(shape.macs("dense") for shape in shapes),
        fixed_params=parameters - sum(shape.dense_weights for shape in shapes),
    )


@torch.inference_mode()
def macs_by_module(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """MACs of one pass over one image, by the innermost module that computes them; "" is the model itself."""
    counted = {
        name.partition(".")[2]: sum(flops.values()) // 2
        for name, flops in _counted(model, input_size).get_flop_counts().items()
        if name != "Global"
    }
    own = Counter(counted)
    for name, macs in counted.items():
        above = (name[:end] for end in range(len(name) - 1, -1, -1) if end == 0 or name[end] == ".")
        if name and (parent := next((module for module in above if module in counted), None)) is not None:
            own[parent] -= macs
    return {name: macs for name, macs in own.items() if macs}


def _counted(model: nn.Module, input_size: tuple[int, int, int]) -> FlopCounterMode:
    """One pass over one image in eval mode, counted; the model is left as it was."""
    training = model.training
    model.eval()
    try:
        reference = next(model.parameters())
        image = torch.zeros(1, *input_size, device=reference.device, dtype=reference.dtype)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(image)
    finally:
        model.train(training)
    return counter
