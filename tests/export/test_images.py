"""Torch-free images come in timm's order with timm's classes, and what cannot be read is named."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset

from export.images import LabelledImages
from export.preprocessing import preprocess
from flora.errors import InputError
from flora.preprocessing import Preprocessing

GREY = Preprocessing(input_size=(1, 28, 28), mean=(0.5,), std=(0.25,))
NAMES = ["9/b10.png", "9/b9.PNG", "10/a.png", "Zebra/1.jpg", "apple/pie/x.png", "apple/2.jpeg", "10/notes.txt"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return _write_images(tmp_path / "images", NAMES)


def _write_images(root: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 28, 3), dtype=np.uint8)
        kind = "JPEG" if file.suffix.startswith(".jp") else "PNG"
        file.write_bytes(_encoded(pixels, kind) if file.suffix != ".txt" else b"no image")
    return root


def _encoded(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _tar_of(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for child in sorted(folder.iterdir(), reverse=True):
            archive.add(child, arcname=f"./{child.name}")
    return path


def _assert_as_timm(path: Path) -> None:
    ours, theirs = LabelledImages(str(path), GREY), create_dataset("", root=str(path), input_img_mode=None)
    reader = theirs.reader
    classes = getattr(reader, "class_to_idx", None) or reader.class_name_to_idx
    assert list(ours.class_names) == sorted(classes, key=classes.get)
    assert len(ours) == len(theirs)
    for index in range(len(ours)):
        (image, label), (expected, expected_label) = ours[index], theirs[index]
        assert label == expected_label
        assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_a_folder_is_read_in_timms_order(folder):
    _assert_as_timm(folder)


def test_a_tar_file_is_read_in_timms_order(folder, tmp_path):
    _assert_as_timm(_tar_of(folder, tmp_path / "images.tar"))


@pytest.mark.parametrize("split", ["val", "validation", "eval"])
def test_a_split_folder_is_found_as_timm_finds_it(tmp_path, split):
    _write_images(tmp_path / "set", [f"{split}/a/1.png", f"{split}/b/2.png", "train/c/3.png"])
    _assert_as_timm(tmp_path / "set")


def test_batches_hold_every_image_once_in_order(folder):
    images = LabelledImages(str(folder), GREY)
    batches = list(images.batches(4))
    assert [len(batch) for batch, _ in batches] == [4, 2]
    assert np.array_equal(np.concatenate([batch for batch, _ in batches])[5], preprocess(images[5][0], GREY))
    labels = np.concatenate([labels for _, labels in batches])
    assert labels.dtype == np.int64
    assert labels.tolist() == [images[i][1] for i in range(len(images))]


def test_a_limit_takes_evenly_spaced_images(folder):
    every, some = LabelledImages(str(folder), GREY), LabelledImages(f"{folder},limit=3", GREY)
    assert some.digests() == every.digests()[::2]
    assert some.class_names == every.class_names
    assert some.record().images == 3


def test_digests_do_not_depend_on_folder_or_tar(folder, tmp_path):
    tar = LabelledImages(str(_tar_of(folder, tmp_path / "t.tar")), GREY)
    assert sorted(tar.digests()) == sorted(LabelledImages(str(folder), GREY).digests())
    assert all(len(digest) == 16 for digest in tar.digests())


def test_a_flat_folder_and_a_flat_tar_are_unlabelled(tmp_path):
    flat = _write_images(tmp_path / "flat", ["1.png", "2.png"])
    for path in (flat, _tar_of(flat, tmp_path / "flat.tar")):
        images = LabelledImages(str(path), GREY)
        assert images.class_names == ()
        assert images[0][1] is None
        assert next(images.batches(2))[1] is None


def test_what_holds_no_images_says_which_endings_are_read(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no images.*\.png, \.jpg, \.jpeg"):
        LabelledImages(str(tmp_path / "empty"), GREY)


def test_a_missing_path_another_file_and_a_dataset_that_needs_torch_are_refused(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK")
    for text, message in [("nowhere", "does not exist"), ("images.zip", "no .tar")]:
        with pytest.raises(InputError, match=message):
            LabelledImages(str(tmp_path / text), GREY)
    with pytest.raises(InputError, match="without them give a folder"):
        LabelledImages("torch/cifar10,root=x", GREY)


def test_an_undecodable_image_is_named(folder):
    good = (folder / "10/a.png").read_bytes()
    for content in (b"", b"not an image", good[: len(good) // 2]):
        (folder / "10/a.png").write_bytes(content)
        with pytest.raises(InputError, match=r"10/a\.png cannot be decoded"):
            list(LabelledImages(str(folder), GREY).batches(8))


def test_a_truncated_tar_is_refused(folder, tmp_path):
    tar = _tar_of(folder, tmp_path / "images.tar")
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(InputError, match="no complete, uncompressed tar"):
        LabelledImages(str(tar), GREY)


def test_a_tar_inside_a_tar_is_named(tmp_path):
    _write_images(tmp_path / "set", ["a/1.png"])
    _tar_of(tmp_path / "set", tmp_path / "set/inner.tar")
    with pytest.raises(InputError, match=r"holds the tar file \./inner\.tar"):
        LabelledImages(str(_tar_of(tmp_path / "set", tmp_path / "outer.tar")), GREY)


def test_images_can_be_chosen_by_their_labels_without_reading_them(folder):
    images = LabelledImages(str(folder), GREY)
    labels = images.labels()
    assert list(labels) == [images[i][1] for i in range(len(images))]
    chosen = images.chosen([4, 1])
    assert chosen.digests() == [images.digests()[4], images.digests()[1]]
    np.testing.assert_array_equal(next(chosen.batches(2))[1], labels[[4, 1]])
    assert len(images) == 6
