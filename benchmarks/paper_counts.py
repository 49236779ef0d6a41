"""The two subnets that FLORA's authors released, counted: MACs by tracing, parameters, the paper's FLOPs by formula.

The figures to reproduce are those of the released code, with layers at or above break-even held as one dense matrix.
"""

from collections.abc import Sequence

import timm
from results import exactly, finish

from flora.lowrank.targets import find_targets, trace_cost
from flora.ranks.cost import Rank
from flora.ranks.paper import DEIT_B_8G, DEIT_S_2G7, paper_flops

LAYERS = ("attn.qkv", "mlp.fc1", "mlp.fc2")
# model, width, ranks, MACs and parameters dense, MACs and parameters at the ranks, the paper's FLOPs dense and there
CASES = (
    (
        "deit_base_patch16_224",
        768,
        DEIT_B_8G,
        (17_563_828_224, 86_567_656, 8_035_811_328, 38_202_088, 17_567_460_096, 8_039_443_200),
    ),
    (
        "deit_small_patch16_224",
        384,
        DEIT_S_2G7,
        (4_598_882_304, 22_050_664, 2_730_074_112, 12_564_328, 4_600_698_240, 2_731_890_048),
    ),
)
KINDS = ("MACs, dense", "parameters, dense", "MACs", "parameters", "paper's FLOPs, dense", "paper's FLOPs")


def ranks_of(dim: int, blocks: Sequence[Sequence[int]]) -> dict[str, Rank]:
    """The ranks by layer of a released subnet of this width, given by block."""
    return {
        f"blocks.{i}.{layer}": "dense" if rank == dim else rank
        for i, block in enumerate(blocks)
        for layer, rank in zip(LAYERS, block, strict=True)
    }


def main() -> None:
    bars, rows, figures = [], [], {}
    for name, dim, blocks, expected in CASES:
        model = timm.create_model(name)
        cost = trace_cost(model, find_targets(model), (3, 224, 224))
        ranks = ranks_of(dim, blocks)
        counted = (
            cost.dense_macs,
            cost.dense_params,
            cost.macs(ranks),
            cost.params(ranks),
            paper_flops(dim, [(dim,) * 3] * len(blocks)),
            paper_flops(dim, blocks),
        )
        figures[name] = dict(zip(KINDS, counted, strict=True))
        rows.append([name, *(f"{count:,}" for count in counted)])
        bars += [exactly(f"{name}, {kind}", *pair) for kind, *pair in zip(KINDS, counted, expected, strict=True)]
    finish("paper_counts", columns=["model", *KINDS], rows=rows, figures=figures, bars=bars, settings={"pixels": 224})


if __name__ == "__main__":
    main()
