"""Full models of four families: the compact model equals the supernet, and ONNX equals torch, at batches 1, 3 and 8.

DeiT, ViT, DeiT-3 and Swin in their three sizes, factorized at a random rank config. Weights are random (LayerScale set
to one, which would hide every error otherwise): this is about equality, not accuracy. One model of each family is also
built into a TensorRT-RTX engine. Each model is an arm of its own; a stopped run resumes where it was.
"""

import argparse
import random
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import timm
import torch
from results import arm, at_most, exactly, finish
from torch import nn

from export.engines import EngineSpec, engine_from_onnx
from export.onnx import onnx_from_module
from export.runners import OnnxRunner
from flora.lowrank.materialize import materialize
from flora.lowrank.supernet import active_ranks, build_supernet
from flora.lowrank.targets import find_targets, trace_cost
from flora.preprocessing import Preprocessing
from flora.ranks.space import space_from_multiples

MODELS = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "deit3_small_patch16_224",
    "deit3_medium_patch16_224",
    "deit3_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
)
WITH_ENGINE = (
    "deit_small_patch16_224",
    "vit_small_patch16_224",
    "deit3_small_patch16_224",
    "swin_tiny_patch4_window7_224",
)
BATCHES = (1, 3, 8)
THREADS = 1


def measure(name: str) -> dict[str, float]:
    """Largest absolute differences of the logits, MACs kept, and the engine's size and build time."""
    seed = zlib.crc32(name.encode())
    torch.manual_seed(seed)
    model = timm.create_model(name).eval()
    for parameter_name, parameter in model.named_parameters():
        if "gamma" in parameter_name:
            nn.init.ones_(parameter)
    settings = Preprocessing(input_size=(3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
    images = torch.randn(max(BATCHES), *settings.input_size)
    cost = trace_cost(model, find_targets(model), settings.input_size)
    space = space_from_multiples(cost)
    build_supernet(model, cost, batches=[images[:2]])
    draw = random.Random(seed)
    ranks = {layer: draw.choice(choices) for layer, choices in space.choices.items()}
    with torch.inference_mode(), active_ranks(model, ranks):
        compact = materialize(model, ranks)
        expected = {batch: model(images[:batch]) for batch in BATCHES}
        counted = trace_cost(compact, [], settings.input_size).dense_macs
        result = {
            "macs_kept": counted / cost.dense_macs,
            "macs_difference": counted - cost.macs(ranks),
            "compact_difference": max(
                (compact(images[:n]) - logits).abs().max().item() for n, logits in expected.items()
            ),
        }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx_from_module(compact, path, preprocessing=settings)
        with OnnxRunner(path, threads=THREADS) as runner:
            result["onnx_difference"] = max(
                float(np.abs(runner(images[:n].numpy()) - logits.numpy()).max()) for n, logits in expected.items()
            )
        if name in WITH_ENGINE:
            started = time.monotonic()
            engine = Path(folder) / "model.engine"
            engine_from_onnx(path, engine, EngineSpec(backend="tensorrt-rtx", min_batch=1, opt_batch=8, max_batch=32))
            result["engine_seconds"] = time.monotonic() - started
            result["engine_mib"] = engine.stat().st_size / 2**20
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="keep the models that a former run has finished")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    figures = {
        name: arm("families", name, lambda name=name: measure(name), fresh=not options.resume) for name in MODELS
    }
    rows = [
        [
            name,
            f"{result['macs_kept']:.0%}",
            f"{result['compact_difference']:.1e}",
            f"{result['onnx_difference']:.1e}",
            f"{result['engine_mib']:.0f} MiB" if "engine_mib" in result else "",
        ]
        for name, result in figures.items()
    ]
    wrong_macs = max(abs(result["macs_difference"]) for result in figures.values())
    engines = sum("engine_mib" in result for result in figures.values())
    bars = [
        at_most(
            "compact against supernet, largest difference", max(r["compact_difference"] for r in figures.values()), 1e-5
        ),
        at_most("ONNX against torch, largest difference", max(r["onnx_difference"] for r in figures.values()), 1e-4),
    ]
    bars.append(exactly("MACs counted on the compact model - MACs of its ranks", wrong_macs, 0))
    bars.append(exactly("TensorRT-RTX engines built", engines, len(WITH_ENGINE)))
    finish(
        "families",
        columns=["model", "MACs kept", "compact - supernet", "ONNX - torch", "TensorRT-RTX engine"],
        rows=rows,
        figures=figures,
        bars=bars,
        settings={"batches": list(BATCHES), "seed": "of the name", "threads": THREADS},
    )


if __name__ == "__main__":
    main()
