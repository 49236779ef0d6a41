"""A teacher's answers kept on disk: the k largest probabilities for each image under each augmentation seed.

An answer is found by image (the digest of its content) and seed, and both are stored and compared, so that a subset or
another order of the images never reads another image's answer. What is missing is asked of the teacher and added: the
first run over an epoch fills it, later runs read it.

A folder holds `teacher.json` and, for each epoch and process, shards `epoch-N-*.npy` of records of fixed size.
"""

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flora.artifact import Document, new_file
from flora.errors import InputError, few

FACTS = "teacher.json"


class TeacherFacts(Document):
    """`teacher.json`: what the answers depend on besides image and seed."""

    kind: Literal["flora teacher answers"] = "flora teacher answers"
    teacher_sha256: str
    classes: int
    top_k: int
    transform: str


class TeacherCache:
    """The answers of one teacher to images under one augmentation."""

    def __init__(self, folder: Path, facts: TeacherFacts) -> None:
        self.folder, self.facts = Path(folder), facts
        file = self.folder / FACTS
        if file.is_file():
            known = TeacherFacts.load(file)
            changed = [key for key in TeacherFacts.model_fields if getattr(known, key) != getattr(facts, key)]
            if changed:
                raise InputError(
                    f"{folder} keeps the answers of another teacher or augmentation ({few(changed)} differ); "
                    "give another folder with --teacher-cache."
                )
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no {FACTS}; give another folder with --teacher-cache.")
        else:
            facts.save(file)

    def epoch(self, number: int) -> "EpochAnswers":
        """The answers of one epoch."""
        return EpochAnswers(self.folder, self.facts, number)


class EpochAnswers:
    """The answers to one epoch's images; new ones are kept in memory until `save`."""

    def __init__(self, folder: Path, facts: TeacherFacts, number: int) -> None:
        self._folder, self._number = folder, number
        self._classes, self._top_k = facts.classes, min(facts.top_k, facts.classes)
        self._record = np.dtype(
            [
                ("image", "<u8"),
                ("seed", "<u4"),
                ("classes", "<u2", (self._top_k,)),
                ("probabilities", "<f2", (self._top_k,)),
            ]
        )
        self._shards = [self._load(path) for path in sorted(folder.glob(f"epoch-{number}-*.npy"))]
        self._places = {
            key: (shard, row)
            for shard, records in enumerate(self._shards)
            for row, key in enumerate(zip(records["image"].tolist(), records["seed"].tolist(), strict=True))
        }
        self._new: list[np.ndarray] = []

    def _load(self, path: Path) -> np.ndarray:
        try:
            records = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}); delete it, its answers will be asked again.") from error
        if records.dtype != self._record:
            raise InputError(f"{path} holds other records than {FACTS} says; delete it.")
        return records

    def find(self, images: list[int], seeds: list[int]) -> tuple[Tensor, Tensor]:
        """Probabilities [B, classes] and which of them are known [B].

        What the k largest leave of one is spread evenly over the other classes.
        """
        found = torch.zeros(len(images), self._classes)
        known = torch.zeros(len(images), dtype=torch.bool)
        for i, key in enumerate(zip(images, seeds, strict=True)):
            place = self._places.get(key)
            if place is None:
                continue
            record = self._shards[place[0]][place[1]]
            found[i] = self._spread(record["classes"], record["probabilities"])
            known[i] = True
        return found, known

    def _spread(self, classes: np.ndarray, probabilities: np.ndarray) -> Tensor:
        kept = torch.from_numpy(probabilities.astype(np.float32))
        others = self._classes - self._top_k
        rest = (1 - kept.sum()).clamp(min=0) / others if others else torch.zeros(())
        full = torch.full((self._classes,), float(rest))
        full[torch.from_numpy(classes.astype(np.int64))] = kept if others else kept / kept.sum()
        return full

    def add(self, images: list[int], seeds: list[int], probabilities: Tensor) -> Tensor:
        """Keep the teacher's answers [B, classes], and return them as `find` will."""
        largest, classes = probabilities.float().cpu().topk(self._top_k, dim=1)
        records = np.zeros(len(images), dtype=self._record)
        records["image"], records["seed"] = images, seeds
        records["classes"], records["probabilities"] = classes.numpy(), largest.numpy()
        self._new.append(records)
        return torch.stack([self._spread(record["classes"], record["probabilities"]) for record in records])

    def save(self) -> None:
        """Write what was added as one more shard."""
        if not self._new:
            return
        records = np.concatenate(self._new)
        name = f"epoch-{self._number}-{len(self._shards)}-{os.environ.get('RANK', '0')}.npy"
        with new_file(self._folder / name) as partial, partial.open("wb") as file:
            np.save(file, records, allow_pickle=False)
        self._new = []
