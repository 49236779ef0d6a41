"""One tiny model led through the commands, each step made once for all tests and only when one asks for it.

Weights are random, yet accuracy means something: the images are labelled by the dense model itself, so it is right on
all of them, and whatever changes its answers costs top-1.
"""

import functools
import io
import json
import tarfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from export.images import LabelledImages
from flora.lowrank.checkpoint import ModelConfig, load_model_folder, save_model
from flora.ranks.config import RankConfig
from tests.flora_command import Outcome, flora
from tests.samples import FAMILIES, GREY, tiny_args, tiny_model

FASHION = Path(__file__).parent.parent / "examples" / "fashion"
MODEL = FAMILIES["vit"][0]
IMAGES = 120
QUICK = ("--repeats", 1, "--threads", 1)
EPOCHS = ("--epochs", 2, "--batch-size", 16, "--lr", 1e-4, "--threads", 1)
GENERATIONS = ("--population", 8, "--parents", 3, "--mutants", 3, "--crossovers", 3, "--generations", 2, "--threads", 1)


class WorkedExample:
    """Folders under `root`; `typed` keeps each command, and `outcomes` what it said."""

    calibration = f"{FASHION / 'calibration.tar'},limit=64"
    training = f"{FASHION / 'selection.tar'},except=1/3,limit=48"
    selection = f"{FASHION / 'selection.tar'},fold=1/3"
    budgets = ("macs=70%", "macs=55%")

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.root = root
        self.outcomes: dict[str, Outcome] = {}
        self.typed: dict[str, tuple[object, ...]] = {}

    @cached_property
    def dense(self) -> Path:
        """The dense model's folder."""
        folder = self.root / "dense"
        names = tuple(str(label) for label in range(10))
        config = ModelConfig(model=MODEL, args=tiny_args(), preprocessing=GREY, class_names=names)
        save_model(folder, self._labelled[0], config)
        return folder

    @cached_property
    def images(self) -> Path:
        """A tar of images of Fashion-MNIST, each under the class that the dense model sees in it."""
        images = self._fashion
        return write_tar(self.root / "images.tar", [images[i][0] for i in range(len(images))], self._labelled[1])

    @cached_property
    def supernet(self) -> Path:
        return self._made("build", self.dense, "--data", self.calibration, "--json")

    @cached_property
    def filtered(self) -> Path:
        return self._made("filter", self.supernet, "--select-data", self.selection, "--threads", 1)

    @cached_property
    def trained(self) -> Path:
        """Two epochs from the dense model's answers, the selection images looked at after each."""
        return self._made("train", self.filtered, "--data", self.training, "--select-data", self.selection, *EPOCHS)

    @cached_property
    def found(self) -> Path:
        """What a search for two budgets found."""
        budgets = [text for budget in self.budgets for text in ("--budget", budget)]
        return self._made("search", self.trained, "--select-data", self.selection, *budgets, *GENERATIONS)

    @cached_property
    def compact(self) -> Path:
        return self._made("materialize", self.supernet, "--uniform", 0.3, "--json")

    @cached_property
    def ranks(self) -> Path:
        """The compact model's ranks as a file."""
        compact = load_model_folder(self.compact)
        path = self.root / "ranks.json"
        RankConfig(model=MODEL, ranks=compact.config.ranks).save(path)
        return path

    @cached_property
    def bundle(self) -> Path:
        """A bundle whose low rank may cost all accuracy: everything in it passed."""
        return self._made("export", self.compact, "--eval-data", self.images, "--max-drop", 100, *QUICK)

    @cached_property
    def failed_bundle(self) -> Path:
        """The same with the thresholds as they are, which the factorized model does not hold; printed as JSON."""
        out = self.root / "failed"
        self.outcomes["failed"] = flora("export", self.compact, "--eval-data", self.images, "-o", out, "--json", *QUICK)
        return out

    @cached_property
    def compressed(self) -> Path:
        """What `flora compress` makes of the dense model, with the steps to it beside it."""
        return self._made(
            *("compress", self.dense, "--calib-data", self.calibration, "--eval-data", self.images),
            *("--budget", "macs=60%", "--space", "multiples=2", "--max-drop", 100, "--threads", 1),
        )

    @property
    def manifest(self) -> dict[str, Any]:
        """What the bundle says of itself."""
        return json.loads((self.bundle / "manifest.json").read_text())

    @cached_property
    def _fashion(self) -> LabelledImages:
        return LabelledImages(f"{FASHION / 'test.tar'},limit={IMAGES}", GREY)

    @cached_property
    def _labelled(self) -> tuple[nn.Module, list[int]]:
        model = tiny_model("vit")
        return model, label_by(model, torch.from_numpy(next(self._fashion.batches(IMAGES))[0]))

    def _made(self, command: str, *args: object) -> Path:
        out = self.root / command
        self.typed[command] = (command, *args, "-o", out)
        outcome = flora(*self.typed[command])
        assert outcome.code == 0, outcome
        self.outcomes[command] = outcome
        return out


def write_tar(path: Path, images: Sequence[Image.Image], classes: Sequence[int]) -> Path:
    """A tar of the images, each under its class."""
    with tarfile.open(path, "w") as archive:
        for number, (image, label) in enumerate(zip(images, classes, strict=True)):
            content = io.BytesIO()
            image.save(content, "png")
            member = tarfile.TarInfo(f"{label}/{number}.png")
            member.size = len(content.getvalue())
            archive.addfile(member, io.BytesIO(content.getvalue()))
    return path


@torch.no_grad()
def label_by(model: nn.Module, images: torch.Tensor) -> list[int]:
    """The classes that a random model sees, its logits shifted and scaled so that every class wins some images."""
    logits = model(images)
    model.head.weight /= logits.std(0)[:, None]
    model.head.bias.copy_((model.head.bias - logits.mean(0)) / logits.std(0))
    classes = model(images).argmax(1)
    assert classes.unique().tolist() == list(range(10)), "every class must win somewhere, or labels shift"
    return classes.tolist()


@functools.cache
def worked_example(root: Path) -> WorkedExample:
    """The one example of this session, whichever conftest asks."""
    return WorkedExample(root)
