"""Which layer of a bundle's file is wrong: every file of lower precision against the FP32 file of its model.

A file that was altered is run all the same, and labelled, where the one it is compared with is as it was exported. An
altered FP32 file is looked for in a sound one of lower precision: where the two part is what was altered. Needs no
torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.bundle import (
    GOLDEN,
    ArtifactEntry,
    Bundle,
    check_golden,
    check_hashes,
    fp32_path,
    hash_files,
    load_bundle,
    read_golden,
)
from export.departures import Comparison, Departure, compare_files
from export.runtimes import ORT_CPU, open_runner, runtime_called
from flora.errors import InputError
from flora.imagesets import at_most
from flora.pipeline.images import open_images

# So many images show a layer that is wrong; a scale is judged the better the more there are.
MOST_IMAGES = 32


@dataclass(frozen=True, kw_only=True)
class FileBisection:
    """One ONNX file: compared with the file `against`, or `note` says why not; what to do about it is its `advice`."""

    path: str
    precision: str
    is_altered: bool
    against: str | None = None
    comparison: Comparison | None = None
    note: str | None = None
    advice: str | None = None
    holds: bool = True

    @property
    def first(self) -> Departure | None:
        """The first layer that departs."""
        return self.comparison.departures[0] if self.comparison and self.comparison.departures else None


@dataclass(frozen=True, kw_only=True)
class BundleBisection:
    """All ONNX files on so many images; `problems` are files that are not as they were exported."""

    files: list[FileBisection]
    problems: list[str]
    images: int

    @property
    def departing(self) -> list[str]:
        """The files that are wrong somewhere."""
        return [one.path for one in self.files if one.first is not None or not one.holds]

    @property
    def passed(self) -> bool:
        return not self.problems and not self.departing

    def as_json(self) -> dict[str, Any]:
        """All that was found, in plain values."""
        return {"images": self.images, "files": [asdict(one) for one in self.files]}


def bisect_bundle(
    folder: Path,
    *,
    data: str | None = None,
    threads: int | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> BundleBisection:
    """Compare each ONNX file of a bundle on its golden images, or on up to `MOST_IMAGES` of `data`, on ONNX Runtime.

    `InputError` where the golden images were altered and there are no others.
    """
    bundle = load_bundle(folder)
    recorded, found = bundle.manifest.files, hash_files(bundle.folder)
    sound = {name for name in recorded if found.get(name) == recorded[name]}
    bench = _Bench(bundle=bundle, sound=sound, images=_images(bundle, data, sound), threads=threads)
    files = []
    for entry in bundle.manifest.artifacts:
        if entry.kind == "onnx":
            on_step(f"comparing {entry.path}")
            files.append(bench.file(entry))
    return BundleBisection(files=files, problems=check_hashes(bundle, found), images=len(bench.images))


def _images(bundle: Bundle, data: str | None, sound: set[str]) -> np.ndarray:
    if data is not None:
        images = open_images(at_most(data, MOST_IMAGES), bundle.manifest.preprocessing)
        for batch, _ in images.batches(MOST_IMAGES):
            return batch
        raise InputError(f"{data} holds no images; give a set that holds some.")
    if GOLDEN not in sound:
        raise InputError(f"{GOLDEN} of {bundle.folder} is not as it was exported; give images with --data.")
    return read_golden(bundle.folder / GOLDEN)[0]


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """A bundle, the names of its files that are as they were exported, and images [B, C, H, W]."""

    bundle: Bundle
    sound: set[str]
    images: np.ndarray
    threads: int | None

    def file(self, entry: ArtifactEntry) -> FileBisection:
        """What there is to say of one ONNX file."""
        if not self.bundle.path_of(entry).is_file():
            return self._left_out(entry, "it is missing", holds=False)
        return self._fp32_file(entry) if entry.precision == "fp32" else self._low_file(entry)

    def _low_file(self, entry: ArtifactEntry) -> FileBisection:
        """A file of lower precision against its FP32 file."""
        reference = self._fp32_of(entry)
        if reference is None:
            return self._left_out(entry, "the bundle has no FP32 file of this model")
        if not self._is_sound(reference):
            return self._left_out(entry, f"{reference.path} is not as it was exported, so nothing is compared with it")
        return self._compared(entry, reference, suspect=entry)

    def _fp32_file(self, entry: ArtifactEntry) -> FileBisection:
        """An FP32 file, which only its golden logits speak for; an altered one against a sound one made from it."""
        made = [one for one in self.bundle.manifest.artifacts if one.precision != "fp32" and self._runs(one)]
        sound = [one for one in made if self._fp32_of(one) == entry and self._is_sound(one)]
        if not self._is_sound(entry) and sound:
            return self._compared(entry, entry, suspect=min(sound, key=lambda one: one.precision != "fp16"))
        if GOLDEN not in self.sound:
            return self._left_out(entry, f"there is nothing to compare it with, and {GOLDEN} is not as it was exported")
        try:
            with open_runner(ORT_CPU, self.bundle.path_of(entry), threads=self.threads, name=entry.path) as run:
                problems = check_golden(self.bundle, entry, run)
        except InputError as error:
            return self._left_out(entry, str(error), holds=False)
        said = "; ".join(line.removeprefix(f"{entry.name}: ") for line in problems) or "it gives its golden logits"
        return self._left_out(entry, f"FP32 itself, compared with golden logits alone: {said}", holds=not problems)

    def _compared(self, entry: ArtifactEntry, reference: ArtifactEntry, *, suspect: ArtifactEntry) -> FileBisection:
        """What is said of `entry`, which is one of the two."""
        if not self._runs(suspect):
            return self._left_out(entry, f"ONNX Runtime's CPU provider runs no files in {suspect.precision}")
        other = suspect if entry is reference else reference
        # What another device computes, node by node; INT8 that is for this one by its kernels.
        as_written = suspect.precision != "int8" or suspect.runtime != ORT_CPU
        try:
            comparison = compare_files(
                self.bundle.path_of(reference),
                self.bundle.path_of(suspect),
                self.images,
                threads=self.threads,
                as_written=as_written,
            )
        except InputError as error:
            return self._left_out(entry, str(error), holds=False)
        altered = not self._is_sound(entry)
        first = comparison.departures[0] if comparison.departures else None
        return FileBisection(
            path=entry.path,
            precision=entry.precision,
            is_altered=altered,
            against=other.path,
            comparison=comparison,
            advice=" ".join(_advice(first, self.bundle.path_of(reference), entry, altered=altered)) or None,
        )

    def _left_out(self, entry: ArtifactEntry, note: str, *, holds: bool = True) -> FileBisection:
        altered = self.bundle.path_of(entry).is_file() and not self._is_sound(entry)
        said = note.removesuffix(".")
        return FileBisection(path=entry.path, precision=entry.precision, is_altered=altered, note=said, holds=holds)

    def _is_sound(self, entry: ArtifactEntry) -> bool:
        beside = f"{entry.path}.data"
        return entry.path in self.sound and (beside not in self.bundle.manifest.files or beside in self.sound)

    def _fp32_of(self, entry: ArtifactEntry) -> ArtifactEntry | None:
        path = fp32_path(entry.path, entry.precision)
        return next((one for one in self.bundle.manifest.artifacts if one.path == path), None)

    def _runs(self, entry: ArtifactEntry) -> bool:
        return entry.kind == "onnx" and entry.precision in runtime_called(ORT_CPU).files


def _advice(first: Departure | None, fp32: Path, entry: ArtifactEntry, *, altered: bool) -> Iterator[str]:
    """What to do about the first layer that departs."""
    if altered:
        if first is None:
            yield "No layer departs, so what was altered shows on none of these images."
        yield "Copy the file again, or export the bundle anew."
        return
    if first is None:
        return
    keep = f"flora calibrate {fp32} --data IMAGES --keep {first.layer} -o FILE"
    if first.kind == "overflow":
        yield "FP16 has no number for what the layer gives (above 65,504): use bf16 or FP32 in place of this file."
    elif first.kind == "scale":
        yield (
            "The scale is too coarse, or these images show too little: look again with more --data; then calibrate "
            f"again, or keep the layer in FP32: {keep}"
        )
    elif entry.precision == "int8":
        yield f"Keep the layer in FP32: {keep}"
    elif entry.precision == "fp8":
        yield f"Keep the layer in FP16: {keep} --precision fp8"
    else:
        yield f"Export the bundle anew; if the layer departs again, use {fp32.name}."
