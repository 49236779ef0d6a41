"""Structural pruning by Torch-Pruning: what low rank is compared with, and what it is put on top of.

The embedding, the dimensions of each head and the hidden units lose those of smallest norm, in all layers alike. A
plain timm model of smaller width is left. No images are needed.
"""

import copy
from bisect import bisect_left

import torch
import torch_pruning
from timm.models.vision_transformer import VisionTransformer

from flora.lowrank.checkpoint import LoadedModel
from flora.lowrank.targets import trace_cost
from flora.lowrank.weights import create_timm_model


def pruned(dense: LoadedModel, share: float, hidden_share: float | None = None) -> LoadedModel:
    """The ViT `dense` without `share` of every width, or without `hidden_share` of its hidden units.

    `share` is of whole dimensions of a head.
    """
    model = copy.deepcopy(dense.module)
    assert isinstance(model, VisionTransformer)
    blocks = list(model.blocks)
    for block in blocks:
        block.attn.fused_attn = False
    heads = {block.attn.qkv: block.attn.num_heads for block in blocks}
    pruner = torch_pruning.pruner.MetaPruner(
        model,
        torch.zeros(1, *dense.config.preprocessing.input_size),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=share,
        pruning_ratio_dict={} if hidden_share is None else {block.mlp.fc1: hidden_share for block in blocks},
        ignored_layers=[model.head],
        num_heads=heads,
        prune_head_dims=True,
    )
    pruner.step()
    width, count = model.pos_embed.shape[-1], heads[blocks[0].attn.qkv]
    args = dense.config.args | {"embed_dim": width, "num_heads": count}
    if hidden_share is not None:
        args["mlp_ratio"] = (blocks[0].mlp.fc1.out_features + 0.5) / width  # timm rounds down
    smaller = dense.config.model_copy(update={"args": args})
    result = create_timm_model(smaller.model, smaller.args)
    result.load_state_dict(model.state_dict())
    return LoadedModel(module=result, config=smaller)


def pruned_to(dense: LoadedModel, macs: int) -> LoadedModel:
    """The ViT `dense` with the smallest share pruned that leaves at most `macs`.

    A dimension less in each head takes off several percent of the MACs: what is left of `macs` goes to hidden units.
    """
    model = dense.module
    assert isinstance(model, VisionTransformer)
    block = model.blocks[0]
    size, units = block.attn.head_dim, block.mlp.fc1.out_features

    def fits(share: float, hidden_share: float | None = None) -> bool:
        module = pruned(dense, share, hidden_share).module
        return trace_cost(module, (), dense.config.preprocessing.input_size).dense_macs <= macs

    def hidden_share(less: int) -> float:
        return (less - 0.5) / units  # Torch-Pruning rounds down what stays

    share = bisect_left(range(size), True, key=lambda less: fits(less / size)) / size
    most = round(share * units)
    less = bisect_left(range(1, most), True, key=lambda less: fits(share, hidden_share(less))) + 1
    return pruned(dense, share, hidden_share(less))
