"""Prune the colour ViT structurally, by Torch-Pruning, and fine-tune it: what the benchmark then factorizes on top.

    python benchmarks/road/pruned.py --cifar cifar10-train.tar

A quarter of every width goes, which leaves 57 % of the MACs. It learns from the model that it came from.
"""

import argparse
from pathlib import Path

import torch
from pruning import pruned
from timm.layers import set_fused_attn

from flora.lowrank.checkpoint import ModelConfig, load_model_folder, save_model
from flora.pipeline.train import TrainRequest, train
from flora.training.settings import training_settings

MODELS = Path(__file__).parent / "models"
SHARE = 0.25
EPOCHS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", required=True, help="CIFAR-10's training images: a tar or folder of class folders")
    parser.add_argument("--runs", type=Path, default=Path("runs/road"))
    parser.add_argument("--bf16", action="store_true", help="for processors with BF16 instructions")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    set_fused_attn(False)
    smaller = pruned(load_model_folder(MODELS / "cifar"), SHARE)
    start = options.runs / "cifar-pruned-start"
    save_model(start, smaller.module, smaller.config)
    precision = "bf16" if options.bf16 else "no"
    settings = training_settings(epochs=EPOCHS, learning_rate=5e-4, warmup_epochs=0.1, precision=precision)
    request = TrainRequest(data=f"{options.cifar},except=1/10", settings=settings, teacher=str(MODELS / "cifar"))
    tuned = train(start, options.runs / "cifar-pruned", request)
    config = tuned.config.model_copy(update={"image_sets": {}, "training": ()})
    assert isinstance(config, ModelConfig)
    save_model(MODELS / "cifar-pruned", tuned.module, config, dtype=torch.float16)


if __name__ == "__main__":
    main()
