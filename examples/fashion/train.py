"""Train the example: a small timm Vision Transformer on Fashion-MNIST.

The model is timm's `vit_tiny_patch16_224` cut to 28 pixels, grey, patches of 4, six blocks: 2.7 M parameters, 50 tokens,
138.6 MMACs. Most epochs see a quarter or a half of the patches (timm's `patch_drop_rate`), which costs a quarter or a
half of the time and regularizes; the last ones see them all. State is saved after each epoch, and the same command
resumes. The held-out accuracy decides nothing but when to stop looking: the weights kept are the last moving average.
"""

import argparse
import json
import time
from pathlib import Path

import timm
import torch
from data import CLASS_NAMES, DEFAULT_ROOT, images, prepare, split_training
from timm.data import create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

MODEL = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 10, "depth": 6}
PREPROCESSING = {
    "input_size": (1, 28, 28),
    "mean": (0.2860,),
    "std": (0.3530,),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
STAGES = ((4, 0.75), (5, 0.5), (3, 0.0))  # epochs, share of the patches dropped
BATCH_SIZE = 128
LEARNING_RATE = 1e-3
WARMUP_STEPS = 300


def transform(training: bool):
    common = {key: PREPROCESSING[key] for key in ("input_size", "mean", "std", "interpolation")}
    if not training:
        return create_transform(**common, crop_pct=PREPROCESSING["crop_pct"])
    return create_transform(
        **common, is_training=True, scale=(0.75, 1.0), ratio=(0.9, 1.1), hflip=0.5, color_jitter=None, re_prob=0.15
    )


@torch.inference_mode()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
    return 100 * hits / len(loader.dataset)


def patch_drop_of_epoch(epoch: int) -> float:
    for epochs, share in STAGES:
        if epoch < epochs:
            return share
        epoch -= epochs
    raise IndexError(epoch)


def train(root: Path, state_file: Path, threads: int) -> nn.Module:
    """Train to the end of the schedule, or from where `state_file` stopped, and return the averaged model."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    trained_on, held_out = split_training(images(prepare(root), train=True))
    epochs = sum(count for count, _ in STAGES)
    steps = len(trained_on) // BATCH_SIZE
    model = timm.create_model(MODEL, **MODEL_ARGS, patch_drop_rate=STAGES[0][1])
    average = ModelEmaV3(model, decay=0.998, use_warmup=True)
    optimizer = create_optimizer_v2(model, "adamw", lr=LEARNING_RATE, weight_decay=0.05)
    schedule = CosineLRScheduler(
        optimizer, epochs * steps, lr_min=1e-5, warmup_t=WARMUP_STEPS, warmup_lr_init=1e-5, t_in_epochs=False
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for name, part in (("model", model), ("average", average), ("optimizer", optimizer)):
            part.load_state_dict(state[name])
        first = state["epoch"]

    trained_on.dataset.transform = transform(training=True)
    evaluation = split_training(images(root, train=True))[1]
    evaluation.dataset.transform = transform(training=False)
    held_out_loader = DataLoader(evaluation, batch_size=250)
    for epoch in range(first, epochs):
        started = time.monotonic()
        model.patch_drop.prob = patch_drop_of_epoch(epoch)
        model.train()
        order = torch.Generator().manual_seed(epoch)
        torch.manual_seed(1000 + epoch)
        loader = DataLoader(trained_on, batch_size=BATCH_SIZE, shuffle=True, drop_last=True, generator=order)
        total = 0.0
        for step, (x, y) in enumerate(loader, start=epoch * steps):
            schedule.step_update(step)
            loss = loss_of(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update(model, step=step)
            total += loss.item()
        state = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch + 1,
        }
        partial = state_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(state_file)
        print(
            json.dumps(
                {
                    "epoch": epoch + 1,
                    "loss": round(total / steps, 4),
                    "held_out_top1": round(accuracy(average.module, held_out_loader), 2),
                    "seconds": round(time.monotonic() - started),
                }
            ),
            flush=True,
        )
    return average.module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="where Fashion-MNIST is or goes")
    parser.add_argument("--state", type=Path, default=Path("fashion-state.pt"), help="resumable training state")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    train(options.root, options.state, options.threads)


if __name__ == "__main__":
    main()
