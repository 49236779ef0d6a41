"""Two-block models of four families with random weights, and random images, configs and layers for them."""

import random
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from flora.preprocessing import Preprocessing
from flora.ranks.cost import LayerShape, ModelCost, Rank

IMAGE = (1, 28, 28)
GREY = Preprocessing(input_size=IMAGE, mean=(0.286,), std=(0.353,), crop_pct=1.0)
PLAIN = {"img_size": 28, "patch_size": 4, "depth": 2, "embed_dim": 48, "num_heads": 3}
SWIN = {
    "img_size": 28,
    "patch_size": 2,
    "window_size": 7,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "embed_dim": 24,
}
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", PLAIN),
    "deit": ("deit_tiny_patch16_224", PLAIN),
    "deit3": ("deit3_small_patch16_224", PLAIN),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
}


def tiny_args(family: str = "vit", **changes: Any) -> dict[str, Any]:
    """The arguments of `timm.create_model` for the tiny model of a family."""
    return {"in_chans": 1, "num_classes": 10, **FAMILIES[family][1], **changes}


def tiny_model(family: str = "vit", *, seed: int = 0, **changes: Any) -> nn.Module:
    """A two-block model whose weights are large enough that a mistake shows in its logits."""
    torch.manual_seed(seed)
    model = timm.create_model(FAMILIES[family][0], **tiny_args(family, **changes))
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def random_images(count: int, *, seed: int = 0) -> Tensor:
    return torch.randn(count, *IMAGE, generator=torch.Generator().manual_seed(seed))


def random_ranks(cost: ModelCost, seed: int) -> dict[str, Rank]:
    """Any legal rank or "dense" for each layer."""
    rng = random.Random(seed)
    return {layer.name: rng.choice([*range(1, layer.full_rank), "dense"]) for layer in cost.layers}


def smallest(cost: ModelCost) -> dict[str, Rank]:
    return {layer.name: 1 for layer in cost.layers}


def cost_of(*layers: tuple[int, int, int]) -> ModelCost:
    """A made-up cost: layers of (in_features, out_features, tokens) in blocks of three, without a model."""
    shapes = (
        LayerShape(name=f"blocks.{i // 3}.l{i % 3}", in_features=a, out_features=b, tokens=tokens)
        for i, (a, b, tokens) in enumerate(layers)
    )
    return ModelCost(layers=tuple(shapes), fixed_macs=1000, fixed_params=100)


def raised(ranks: Mapping[str, Rank], name: str, cost: ModelCost) -> dict[str, Rank]:
    """`ranks` with the rank of one layer one higher ("dense" above the highest rank)."""
    rank = ranks[name]
    higher = "dense" if rank == "dense" or rank + 1 == cost.shapes[name].full_rank else rank + 1
    return {**ranks, name: higher}
