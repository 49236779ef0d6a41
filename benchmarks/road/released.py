"""The released format: a supernet made from timm's DeiT-S by the authors' recipe, imported, beside flora's own.

No pretrained weights can be had where this runs, so they are timm's initial ones; the arithmetic is the same.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.utils import random_seed
from torch import Tensor, nn

from flora.lowrank.supernet import active_ranks, build_supernet
from flora.lowrank.targets import find_targets, trace_cost
from flora.pipeline.import_released import import_checkpoint
from flora.ranks.cost import Rank
from flora.ranks.paper import DEIT_S_2G7

MODEL = "deit_small_patch16_224"
IMAGES = 4


def released_arm() -> dict[str, Any]:
    """The largest difference of logits between the imported supernet and timm's model factorized by plain SVD."""
    random_seed(0)
    model = timm.create_model(MODEL).eval()
    images = torch.randn(IMAGES, *model.default_cfg["input_size"])
    targets = find_targets(model)
    ranks = dict(zip(targets, np.ravel(DEIT_S_2G7).tolist(), strict=True))
    configs: dict[str, dict[str, Rank]] = {
        "full rank": dict.fromkeys(targets, "dense"),
        "2.73 G": {name: rank if rank < model.embed_dim else "dense" for name, rank in ranks.items()},
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "supernet.pth"
        torch.save({"model": released_state(model)}, checkpoint)
        imported = import_checkpoint(checkpoint, Path(folder) / "supernet", model=MODEL, args={}).module.eval()
    build_supernet(model, trace_cost(model, targets, images.shape[1:]), method="svd")
    differences, largest = {}, 0.0
    for name, config in configs.items():
        with active_ranks(imported, config), active_ranks(model, config), torch.inference_mode():
            own, theirs = model(images), imported(images)
        differences[name] = (own - theirs).abs().max().item()
        largest = max(largest, own.abs().max().item())
    return {"differences": differences, "max_abs": max(differences.values()), "largest_logit": largest}


def released_state(model: nn.Module) -> dict[str, Tensor]:
    """A supernet's state dict as the authors' script writes it.

    It takes numpy's SVD of the transposed weight, and puts the singular values on the side of the residual stream.
    """
    state = dict(model.state_dict())
    for name in find_targets(model):
        weight, bias = state.pop(f"{name}.weight").numpy(), state.pop(f"{name}.bias")
        left, singular, right = np.linalg.svd(weight.T, full_matrices=False)
        down, up = left.T, right.T
        if name.endswith("fc2"):
            up = up * singular
        else:
            down = singular[:, None] * down
        state[f"{name}.VT.weight"] = torch.from_numpy(np.ascontiguousarray(down))
        state[f"{name}.U.weight"] = torch.from_numpy(np.ascontiguousarray(up))
        state[f"{name}.U.bias"] = bias
    return state
