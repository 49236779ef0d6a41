"""Train the example: a small timm Vision Transformer on Fashion-MNIST.

The model is timm's `vit_tiny_patch16_224` cut to 28 pixels, grey, patches of 4 and six blocks: 2.7 M parameters, 50
tokens, 138.6 MMACs. Most epochs see a quarter or a half of the patches (timm's `patch_drop_rate`), which costs as much
less time and regularizes; the last ones see them all. State is saved after each epoch, and the same command resumes.
At the end the moving average of the weights goes to `model/` in half precision, and the course to `training.json`.
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
from timm.utils import ModelEmaV3, random_seed
from torch import nn
from torch.utils.data import DataLoader

from flora.artifact import new_file
from flora.lowrank.checkpoint import ModelConfig, load_model_folder, save_model
from flora.preprocessing import Preprocessing
from flora.training.data import TimmImages, eval_transform
from flora.training.evaluate import evaluate

HERE = Path(__file__).parent
MODEL = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 10, "depth": 6}
PREPROCESSING = Preprocessing(input_size=(1, 28, 28), mean=(0.2860,), std=(0.3530,), crop_pct=1.0)
STAGES = ((4, 0.75), (5, 0.5), (3, 0.0))  # epochs, share of the patches dropped
BATCH_SIZE = 128
LEARNING_RATE = 1e-3
WARMUP_STEPS = 300


def training_transform():
    return create_transform(
        **PREPROCESSING.model_dump(include={"input_size", "mean", "std", "interpolation"}),
        is_training=True,
        scale=(0.75, 1.0),
        ratio=(0.9, 1.1),
        hflip=0.5,
        color_jitter=None,
        re_prob=0.15,
    )


def patch_drop_of_epoch(epoch: int) -> float:
    for epochs, share in STAGES:
        if epoch < epochs:
            return share
        epoch -= epochs
    raise IndexError(epoch)


def train(root: Path, state_file: Path, threads: int, bf16: bool) -> tuple[nn.Module, list[dict]]:
    """Train to the end of the schedule, from where `state_file` stopped; the averaged model, and a line an epoch."""
    torch.set_num_threads(threads)
    random_seed(0)
    trained_on, _ = split_training(images(root, train=True))
    trained_on.dataset.transform = training_transform()
    _, held_out = split_training(images(root, train=True))
    held_out.dataset.transform = eval_transform(PREPROCESSING)
    held_out_loader = DataLoader(held_out, batch_size=250)
    epochs = sum(count for count, _ in STAGES)
    steps = len(trained_on) // BATCH_SIZE
    model = timm.create_model(MODEL, **MODEL_ARGS, patch_drop_rate=STAGES[0][1])
    average = ModelEmaV3(model, decay=0.998, use_warmup=True)
    optimizer = create_optimizer_v2(model, "adamw", lr=LEARNING_RATE, weight_decay=0.05)
    schedule = CosineLRScheduler(
        optimizer, epochs * steps, lr_min=1e-5, warmup_t=WARMUP_STEPS, warmup_lr_init=1e-5, t_in_epochs=False
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    history: list[dict] = []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for name, part in (("model", model), ("average", average), ("optimizer", optimizer)):
            part.load_state_dict(state[name])
        history = state["history"]
    for epoch in range(len(history), epochs):
        started = time.monotonic()
        model.patch_drop.prob = patch_drop_of_epoch(epoch)
        model.train()
        order = torch.Generator().manual_seed(epoch)
        random_seed(1000 + epoch)
        loader = DataLoader(trained_on, batch_size=BATCH_SIZE, shuffle=True, drop_last=True, generator=order)
        total = 0.0
        for step, (x, y) in enumerate(loader, start=epoch * steps):
            schedule.step_update(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(x)
            loss = loss_of(logits.float(), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update(model, step=step)
            total += loss.item()
        history.append(
            {
                "epoch": epoch + 1,
                "loss": round(total / steps, 4),
                "held_out_top1": round(evaluate(average.module, held_out_loader).top1, 2),
                "seconds": round(time.monotonic() - started),
            }
        )
        print(json.dumps(history[-1]), flush=True)
        state = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": history,
        }
        with new_file(state_file) as partial:
            torch.save(state, partial)
    return average.module, history


def finish(model: nn.Module, history: list[dict], root: Path) -> None:
    """Write `model/` in half precision and `training.json`, with the test accuracy before and after rounding."""
    config = ModelConfig(model=MODEL, args=MODEL_ARGS, preprocessing=PREPROCESSING, class_names=tuple(CLASS_NAMES))
    test = TimmImages(f"torch/fashion_mnist,root={root},split=test", PREPROCESSING).loader(250)
    save_model(HERE / "model", model, config, dtype=torch.float16)
    result = {
        "history": history,
        "test_top1": evaluate(model, test).top1,
        "test_top1_stored_in_half_precision": evaluate(load_model_folder(HERE / "model").module, test).top1,
        "test_images": 10_000,
    }
    (HERE / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    print({key: value for key, value in result.items() if key != "history"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="where Fashion-MNIST is or goes")
    parser.add_argument("--state", type=Path, default=Path("runs/fashion-state.pt"), help="resumable training state")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bf16", action="store_true", help="autocast; pays only on processors with BF16 instructions")
    options = parser.parse_args()
    root = prepare(options.root)
    model, history = train(root, options.state, options.threads, options.bf16)
    finish(model, history, root)


if __name__ == "__main__":
    main()
