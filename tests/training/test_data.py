"""Any image set gives timm's own evaluation transform of its images, with their labels, and bad sets are refused."""

import io
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch import Tensor

from flora.errors import InputError
from flora.preprocessing import Preprocessing
from flora.training.data import TimmImages, eval_transform
from tests.samples import GREY

COLOUR = Preprocessing(
    input_size=(3, 32, 24), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), interpolation="bilinear", crop_pct=0.9
)
NUMBER = 20


def _all(images: TimmImages, batch_size: int = 8) -> tuple[Tensor, Tensor]:
    batches = list(images.loader(batch_size))
    return torch.cat([batch for batch, _ in batches]), torch.cat([labels for _, labels in batches])


def _expected(dataset, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """What timm's data set and transform give for the same settings."""
    dataset.transform = create_transform(
        input_size=preprocessing.input_size,
        mean=preprocessing.mean,
        std=preprocessing.std,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
    )
    pairs = [dataset[i] for i in range(len(dataset))]
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


@pytest.fixture(scope="module")
def image_tar(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tar") / "images.tar"
    with tarfile.open(path, "w") as archive:
        for file in sorted(image_folder.rglob("*.png")):
            archive.add(file, arcname=str(file.relative_to(image_folder)))
    return path


@pytest.fixture(scope="module")
def fashion_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images for each split, as torchvision keeps Fashion-MNIST."""
    root = tmp_path_factory.mktemp("fashion")
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for seed, part in enumerate(("train", "t10k")):
        pixels = np.random.default_rng(seed).integers(0, 256, (10, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 10, 28, 28) + pixels.tobytes())
        labels = np.arange(10, dtype=np.uint8)[::-1]
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 10) + labels.tobytes())
    return root


@pytest.mark.parametrize("preprocessing", [GREY, COLOUR], ids=["grey", "colour"])
def test_a_folder_gives_timms_evaluation_transform(image_folder: Path, preprocessing: Preprocessing):
    images, labels = _all(TimmImages(str(image_folder), preprocessing))
    dataset = create_dataset("", str(image_folder), input_img_mode=preprocessing.image_mode)
    expected, expected_labels = _expected(dataset, preprocessing)
    assert images.shape == (NUMBER, *preprocessing.input_size)
    assert torch.equal(images, expected)
    assert torch.equal(labels, expected_labels)
    assert len(set(labels.tolist())) == 10


def test_a_tar_gives_what_its_folder_gives(image_folder: Path, image_tar: Path):
    images, labels = _all(TimmImages(str(image_tar), GREY))
    from_folder, folder_labels = _all(TimmImages(str(image_folder), GREY))
    assert torch.equal(images, from_folder)
    assert torch.equal(labels, folder_labels)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("preprocessing", [GREY, COLOUR], ids=["grey", "colour"])
def test_a_torchvision_set_gives_timms_evaluation_transform(fashion_root, split: str, preprocessing: Preprocessing):
    images, labels = _all(TimmImages(f"torch/fashion_mnist,root={fashion_root},split={split}", preprocessing))
    dataset = create_dataset("torch/fashion_mnist", str(fashion_root), split=split)
    transform = eval_transform(preprocessing)
    expected = torch.stack([transform(dataset[i][0].convert(preprocessing.image_mode)) for i in range(10)])
    assert torch.equal(images, expected)
    assert labels.tolist() == list(range(10))[::-1]


def test_the_validation_split_is_the_default(fashion_root: Path):
    by_default = _all(TimmImages(f"torch/fashion_mnist,root={fashion_root}", GREY))[0]
    named = _all(TimmImages(f"torch/fashion_mnist,root={fashion_root},split=validation", GREY))[0]
    assert torch.equal(by_default, named)


@pytest.mark.parametrize("batch_size", [1, 7, 20, 64])
def test_batches_hold_every_image_once_whatever_their_size(image_folder: Path, batch_size: int):
    images, labels = _all(TimmImages(str(image_folder), GREY), batch_size)
    expected, expected_labels = _all(TimmImages(str(image_folder), GREY))
    assert torch.equal(images, expected)
    assert torch.equal(labels, expected_labels)


def test_a_limit_takes_every_nth_image(image_folder: Path):
    limited = TimmImages(f"{image_folder},limit=5", GREY)
    images, labels = _all(limited)
    every, every_label = _all(TimmImages(str(image_folder), GREY))
    assert len(limited) == 5
    assert torch.equal(images, every[::4])
    assert torch.equal(labels, every_label[::4])


def test_images_can_be_read_several_times(image_folder: Path):
    batches = TimmImages(str(image_folder), GREY).images(8)
    first, second = list(batches), list(batches)
    assert [len(batch) for batch in first] == [8, 8, 4]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_arrays_equal_tensors(image_folder: Path):
    source = TimmImages(str(image_folder), GREY)
    for (array, labels), (tensor, label_tensor) in zip(source.batches(8), source.loader(8), strict=True):
        assert np.array_equal(array, tensor.numpy())
        assert np.array_equal(labels, label_tensor.numpy())


def test_workers_give_the_same_images(image_folder: Path):
    one, other = TimmImages(str(image_folder), GREY), TimmImages(str(image_folder), GREY, workers=1)
    assert torch.equal(_all(one)[0], _all(other)[0])


def test_a_record_has_a_digest_for_each_image(image_folder: Path, fashion_root: Path):
    for text, number in ((str(image_folder), NUMBER), (f"torch/fashion_mnist,root={fashion_root}", 10)):
        record = TimmImages(text, GREY).record()
        assert (record.spec, record.images) == (text, number)
        assert len(set(record.image_digests)) == number


def test_a_folder_and_its_tar_have_the_same_digest(image_folder: Path, image_tar: Path):
    assert TimmImages(str(image_folder), GREY).record().digest == TimmImages(str(image_tar), GREY).record().digest


def test_a_limited_record_holds_the_images_taken(image_folder: Path):
    whole = TimmImages(str(image_folder), GREY).record().image_digests
    assert TimmImages(f"{image_folder},limit=5", GREY).record().image_digests == whole[::4]


def test_labels_and_names_are_those_of_the_images_without_a_file_being_opened(
    image_folder: Path, image_tar: Path, fashion_root: Path, tmp_path: Path
):
    fashion = TimmImages(f"torch/fashion_mnist,root={fashion_root},limit=4", GREY)
    folder = shutil.copytree(image_folder, tmp_path / "images")
    sets = [
        TimmImages(text, GREY) for text in (f"{folder}/,limit=5", str(image_tar), f"torch/image_folder,root={folder}")
    ]
    labels = [_all(images)[1] for images in (fashion, *sets)]
    for path in folder.rglob("*.png"):
        path.unlink()
    for images, expected in zip((fashion, *sets), labels, strict=True):
        assert torch.equal(images.labels(), expected)
    assert [images.names() for images in sets[:1]] == [["0/0.png", "2/2.png", "4/4.png", "6/6.png", "8/8.png"]]
    assert sets[1].names() == [f"{i % 10}/{i}.png" for j in range(10) for i in (j, j + 10)]
    assert sorted(sets[2].names()) == sorted(sets[1].names())
    assert fashion.names() == ["0", "2", "5", "7"]


def test_the_splits_of_a_torchvision_set_share_no_image(fashion_root: Path):
    one, other = (
        TimmImages(f"torch/fashion_mnist,root={fashion_root},split={split}", GREY).record()
        for split in ("train", "validation")
    )
    one.refuse_overlap(other, own_role="evaluation", other_role="calibration")
    assert one.digest != other.digest


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"no image", _png()[:20], _png()[:400], _png()[:300] + b"x" * 99])
def test_a_corrupt_image_is_refused_by_name(tmp_path: Path, content: bytes):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(_png())
    (tmp_path / "a" / "2-broken.png").write_bytes(content)
    with pytest.raises(InputError, match=r"2-broken\.png"):
        _all(TimmImages(str(tmp_path), GREY))


def test_a_corrupt_image_of_a_tar_is_refused_by_name(tmp_path: Path):
    (tmp_path / "broken.png").write_bytes(_png()[:200])
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(tmp_path / "broken.png", arcname="a/broken.png")
    with pytest.raises(InputError, match=r"broken\.png"):
        _all(TimmImages(str(tmp_path / "images.tar"), GREY))


def test_a_folder_without_images_is_refused_by_name(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").touch()
    with pytest.raises(InputError, match=f"{tmp_path}.*0 images"):
        TimmImages(str(tmp_path), GREY)


def test_a_tar_without_images_is_refused_by_name(tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(tmp_path / "notes.txt", arcname="a/notes.txt")
    with pytest.raises(InputError, match=r"images\.tar"):
        TimmImages(str(tmp_path / "images.tar"), GREY)


@pytest.mark.parametrize("content", [b"", b"no tar" * 200])
def test_a_file_that_is_no_tar_is_refused_by_name(tmp_path: Path, content: bytes):
    (tmp_path / "images.tar").write_bytes(content)
    with pytest.raises(InputError, match=r"images\.tar"):
        TimmImages(str(tmp_path / "images.tar"), GREY)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("/nowhere/photos", "/nowhere/photos does not exist"),
        ("torch/fashion_mnits,root=/nowhere", "Did you mean fashion_mnist"),
        ("torch/fashion_mnist,root=/nowhere", "fashion_mnist"),
    ],
)
def test_a_set_that_is_not_there_is_refused_by_name(text: str, named: str):
    with pytest.raises(InputError, match=named):
        TimmImages(text, GREY)


def test_a_torchvision_set_without_root_is_refused_by_name():
    with pytest.raises(InputError, match="torch/fashion_mnist"):
        TimmImages("torch/fashion_mnist", GREY)


def test_images_can_be_chosen(image_folder):
    images = TimmImages(f"{image_folder},fold=1/2", GREY)
    chosen = images.chosen([3, 0])
    assert chosen.digests() == [images.digests()[3], images.digests()[0]]
    assert chosen.labels().tolist() == images.labels()[[3, 0]].tolist()
    assert len(images) > 2
