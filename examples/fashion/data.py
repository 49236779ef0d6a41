"""Where Fashion-MNIST comes from, and how it is split.

torchvision reads the four idx files from ROOT/FashionMNIST/raw. Debian ships them in the package
`dataset-fashion-mnist`; everywhere else torchvision downloads them. The held-out part is every twelfth training image:
`train.py` watches it, and the selection images of the example are drawn from it. The test set is read once, at the end.
"""

import gzip
import shutil
from pathlib import Path

from timm.data import create_dataset
from torch.utils.data import Subset
from torchvision.datasets import FashionMNIST

DEBIAN_FILES = Path("/usr/share/datasets/fashion-mnist")
DEFAULT_ROOT = Path.home() / ".cache" / "flora" / "fashion-mnist"
HELD_OUT_EVERY = 12
CLASS_NAMES = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
]


def prepare(root: Path = DEFAULT_ROOT) -> Path:
    """Put the complete data set under `root`, unless it is there, and return `root`."""
    raw = root / "FashionMNIST" / "raw"
    if not DEBIAN_FILES.is_dir():
        for train in (True, False):
            FashionMNIST(root, train=train, download=True)
        return root
    raw.mkdir(parents=True, exist_ok=True)
    for packed in DEBIAN_FILES.glob("*-ubyte.gz"):
        unpacked = raw / packed.stem
        if not unpacked.exists():
            partial = unpacked.with_suffix(".partial")
            with gzip.open(packed) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target)
            partial.replace(unpacked)
    return root


def images(root: Path, *, train: bool):
    """The training or the test set, as timm reads it (PIL images in grey, integer labels)."""
    return create_dataset("torch/fashion_mnist", str(root), split="train" if train else "validation")


def split_training(dataset) -> tuple[Subset, Subset]:
    """The part to train on, and the held-out part."""
    held_out = range(0, len(dataset), HELD_OUT_EVERY)
    return (
        Subset(dataset, [i for i in range(len(dataset)) if i % HELD_OUT_EVERY]),
        Subset(dataset, list(held_out)),
    )
