"""Two-block models of four families and random images, for the tests of export/."""

import numpy as np
import timm
import torch
from torch import nn

from flora.preprocessing import Preprocessing

GREY = Preprocessing(input_size=(1, 28, 28), mean=(0.2860,), std=(0.3530,), crop_pct=1.0)
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 28, "patch_size": 4, "depth": 2}),
    "deit": ("deit_tiny_patch16_224", {"img_size": 28, "patch_size": 4, "depth": 2}),
    "deit3": ("deit3_small_patch16_224", {"img_size": 28, "patch_size": 4, "depth": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 28, "patch_size": 2, "window_size": 7, "depths": (1, 1), "num_heads": (3, 6), "embed_dim": 48},
    ),
}


def tiny_model(family: str = "vit", seed: int = 0) -> nn.Module:
    """A two-block model with weights large enough that mistakes show in its logits."""
    name, arguments = FAMILIES[family]
    torch.manual_seed(seed)
    model = timm.create_model(name, in_chans=1, num_classes=10, **arguments)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("gamma"):
            nn.init.ones_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.eval()


def random_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *GREY.input_size)).astype(np.float32)
