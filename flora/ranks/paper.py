"""What the paper FLORA (arXiv 2311.03912) and its released code fix in numbers: its subnets and its "FLOPs".

The paper's FLOPs are multiply-accumulates, plus one operation for each element of each LayerNorm (of the last one only
the class token). Everywhere else flora counts MACs. The ranks below are those of the two released subnets, in the order
qkv, fc1, fc2 block by block; 384 of 384 means dense.
"""

from collections.abc import Sequence

DEIT_B_8G = (
    (96, 192, 288),
    (96, 96, 96),
    (96, 288, 96),
    (288, 384, 192),
    (192, 96, 192),
    (384, 192, 288),
    (288, 384, 384),
    (288, 288, 192),
    (288, 288, 192),
    (288, 480, 96),
    (288, 384, 96),
    (288, 96, 96),
)
DEIT_S_2G7 = (
    (64, 192, 128),
    (64, 192, 128),
    (128, 192, 192),
    (192, 192, 64),
    (192, 192, 128),
    (192, 128, 128),
    (128, 256, 192),
    (128, 320, 128),
    (384, 192, 64),
    (128, 192, 64),
    (256, 192, 64),
    (192, 64, 64),
)


def paper_flops(dim: int, blocks: Sequence[tuple[int, int, int]], *, classes: int = 1000) -> int:
    """The released code's FLOPs of a DeiT at 224 pixels, patch 16, whose blocks have these ranks of `dim`.

    A closed formula of its own, so that it can be held against what is counted: patch embedding, and in each block two
    LayerNorms, the two attention products, `proj`, and the three factorized layers, never dearer than dense.
    """
    patches, tokens = 196, 197
    total = patches * dim * 3 * 16**2 + dim + classes * dim
    for qkv, fc1, fc2 in blocks:
        total += 2 * tokens * dim + 2 * tokens**2 * dim + tokens * dim**2
        total += tokens * min(3 * dim**2, 4 * qkv * dim)
        total += tokens * min(4 * dim**2, 5 * fc1 * dim) + tokens * min(4 * dim**2, 5 * fc2 * dim)
    return total
