"""Train the dense models of the benchmark `paper_road`, from scratch, on images that lie in memory.

    python benchmarks/road/dense.py fashion7
    python benchmarks/road/dense.py cifar --cifar cifar10-train.tar
    python benchmarks/road/dense.py swin

Every sixth image of Fashion-MNIST and every tenth of CIFAR-10 is held out: searches select on some of them and rescore
on others. The ViTs see a share of their patches in most epochs (timm's `patch_drop_rate`), which costs as much less.
State is saved after each epoch, and the same command resumes. At the end the moving average of the weights goes to
`models/NAME` in half precision, and the course to `models/NAME.json`.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, create_dataset
from timm.data.random_erasing import RandomErasing
from timm.layers import set_fused_attn
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "examples" / "fashion"))

from data import CLASS_NAMES, DEFAULT_ROOT, prepare  # noqa: E402

from flora.artifact import new_file  # noqa: E402
from flora.lowrank.checkpoint import ModelConfig, save_model  # noqa: E402
from flora.preprocessing import Preprocessing  # noqa: E402
from flora.training.evaluate import evaluate  # noqa: E402

MODELS = HERE / "models"
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCH_SIZE = 128
GREY = {"mean": (0.2860,), "std": (0.3530,), "crop_pct": 1.0}
COLOUR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616), "crop_pct": 1.0}


@dataclass(frozen=True, kw_only=True)
class DenseModel:
    """What to train: `stages` are pairs of epochs and the share of patches dropped in them."""

    model: str
    args: dict
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    held_out_every: int
    stages: tuple[tuple[int, float], ...]
    padding: int
    mix_prob: float
    learning_rate: float = 1e-3

    @property
    def epochs(self) -> int:
        return sum(epochs for epochs, _ in self.stages)

    def patch_drop(self, epoch: int) -> float:
        """The share of patches dropped in `epoch`, counted from 0."""
        for epochs, share in self.stages:
            if epoch < epochs:
                return share
            epoch -= epochs
        raise IndexError(epoch)


VIT = {"num_classes": 10, "depth": 6}
DENSE_MODELS = {
    "fashion7": DenseModel(
        model="vit_tiny_patch16_224",
        args=VIT | {"img_size": 28, "patch_size": 7, "in_chans": 1},
        preprocessing=Preprocessing(input_size=(1, 28, 28), **GREY),
        class_names=tuple(CLASS_NAMES),
        held_out_every=6,
        stages=((30, 0.0),),
        padding=2,
        mix_prob=0.0,
    ),
    "cifar": DenseModel(
        model="vit_tiny_patch16_224",
        args=VIT | {"img_size": 32, "patch_size": 4},
        preprocessing=Preprocessing(input_size=(3, 32, 32), **COLOUR),
        class_names=CIFAR_CLASSES,
        held_out_every=10,
        stages=((40, 0.75), (12, 0.5), (6, 0.0)),
        padding=4,
        mix_prob=0.3,
    ),
    "cifar-hybrid": DenseModel(
        model="tiny_vit_5m_224",
        args={
            "num_classes": 10,
            "embed_dims": (32, 64, 96, 128),
            "depths": (1, 2, 4, 2),
            "num_heads": (1, 2, 3, 4),
            "window_sizes": (8, 8, 4, 2),
        },
        preprocessing=Preprocessing(input_size=(3, 64, 64), **COLOUR),
        class_names=CIFAR_CLASSES,
        held_out_every=10,
        stages=((15, 0.0),),
        padding=8,
        mix_prob=0.3,
    ),
    "swin": DenseModel(
        model="swin_tiny_patch4_window7_224",
        args={
            "img_size": 28,
            "patch_size": 2,
            "window_size": 7,
            "in_chans": 1,
            "num_classes": 10,
            "embed_dim": 64,
            "depths": (2, 4),
            "num_heads": (2, 4),
        },
        preprocessing=Preprocessing(input_size=(1, 28, 28), **GREY),
        class_names=tuple(CLASS_NAMES),
        held_out_every=6,
        stages=((14, 0.0),),
        padding=2,
        mix_prob=0.0,
    ),
}


def arrays(dataset, settings: Preprocessing) -> tuple[Tensor, Tensor]:
    """All images of a dataset as uint8 [N, C, H, W] in the model's size, and their labels [N]."""
    size = settings.input_size[:0:-1]
    images = [np.asarray(dataset[i][0].resize(size, Image.Resampling.BICUBIC)) for i in range(len(dataset))]
    labels = torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])
    stacked = torch.from_numpy(np.stack(images))
    return stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2).contiguous(), labels


def normalize(images: Tensor, settings: Preprocessing) -> Tensor:
    """uint8 [B, C, H, W] to the float32 that the model sees."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (settings.mean, settings.std))
    return (images.float() / 255 - mean) / std


def augment(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """A random crop of the padded image and a random mirror, drawn for each image [B, C, H, W]."""
    batch, channels, height, width = images.shape
    padded = F.pad(images, [padding] * 4)
    rows = torch.randint(2 * padding + 1, (batch, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(2 * padding + 1, (batch, 1), generator=generator) + torch.arange(width)
    mirrored = torch.rand(batch, generator=generator) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    index = torch.arange(batch)[:, None, None, None]
    channel = torch.arange(channels)[None, :, None, None]
    return padded[index, channel, rows[:, None, :, None], columns[:, None, None, :]]


def train(spec: DenseModel, dataset, state_file: Path, *, bf16: bool = False) -> tuple[nn.Module, list[dict]]:
    """Train to the end of the schedule, from where `state_file` stopped; the averaged model, and a line an epoch."""
    settings, number_format = spec.preprocessing, torch.bfloat16 if bf16 else None
    images, labels = arrays(dataset, settings)
    is_held_out = torch.arange(len(labels)) % spec.held_out_every == 0
    trained_on = torch.nonzero(~is_held_out).flatten()
    held_out = [
        (normalize(images[part], settings), labels[part]) for part in torch.nonzero(is_held_out).flatten().split(250)
    ]
    steps = len(trained_on) // BATCH_SIZE
    random_seed(0)
    has_patch_drop = spec.stages[0][1] > 0
    model = timm.create_model(spec.model, **spec.args, **({"patch_drop_rate": 0.5} if has_patch_drop else {}))
    average = ModelEmaV3(model, decay=0.998, use_warmup=True)
    optimizer = create_optimizer_v2(model, "adamw", lr=spec.learning_rate, weight_decay=0.05)
    schedule = CosineLRScheduler(
        optimizer, spec.epochs * steps, lr_min=1e-5, warmup_t=300, warmup_lr_init=1e-5, t_in_epochs=False
    )
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, prob=spec.mix_prob, label_smoothing=0.1, num_classes=10)
    erase = RandomErasing(probability=0.2, max_area=0.2, mode="const", device="cpu")
    loss_of = SoftTargetCrossEntropy()
    history: list[dict] = []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for name, part in (("model", model), ("average", average), ("optimizer", optimizer)):
            part.load_state_dict(state[name])
        history = state["history"]
    for epoch in range(len(history), spec.epochs):
        started = time.monotonic()
        if has_patch_drop:
            model.patch_drop.prob = spec.patch_drop(epoch)
        model.train()
        random_seed(1000 + epoch)
        generator = torch.Generator().manual_seed(epoch)
        order = trained_on[torch.randperm(len(trained_on), generator=generator)]
        total = 0.0
        for step, part in enumerate(order[: steps * BATCH_SIZE].split(BATCH_SIZE), start=epoch * steps):
            schedule.step_update(step)
            batch = erase(normalize(augment(images[part], spec.padding, generator), settings))
            batch, targets = mixup(batch, labels[part])
            with torch.autocast("cpu", number_format, enabled=bf16):
                loss = loss_of(model(batch).float(), targets)
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
                "held_out_top1": round(evaluate(average.module, held_out, autocast=number_format).top1, 2),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=DENSE_MODELS)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="where Fashion-MNIST is or goes")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10's training images: a tar or folder of class folders")
    parser.add_argument("--state", type=Path, help="resumable training state (default runs/NAME-state.pt)")
    parser.add_argument("--bf16", action="store_true", help="for processors with BF16 instructions")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    set_fused_attn(False)  # on a CPU, and with so few tokens, two products are faster than the fused kernel
    spec = DENSE_MODELS[options.name]
    if options.name.startswith("cifar"):
        if options.cifar is None:
            parser.error(
                f"{options.name} needs --cifar: CIFAR-10's training images as a tar or folder of class folders"
            )
        dataset = create_dataset("", root=str(options.cifar))
    else:
        dataset = create_dataset("torch/fashion_mnist", str(prepare(options.root)), split="train")
    model, history = train(spec, dataset, options.state or Path(f"runs/{options.name}-state.pt"), bf16=options.bf16)
    config = ModelConfig(
        model=spec.model, args=spec.args, preprocessing=spec.preprocessing, class_names=spec.class_names
    )
    save_model(MODELS / options.name, model, config, dtype=torch.float16)
    (MODELS / f"{options.name}.json").write_text(json.dumps({"history": history}, indent=1) + "\n")


if __name__ == "__main__":
    main()
