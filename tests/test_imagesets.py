"""An image set is named by one text, takes evenly spaced images, and shares none with another."""

import dataclasses

import pytest

from flora.errors import InputError
from flora.imagesets import ImageSetRecord, ImageSetSpec, at_most, image_digest


@pytest.mark.parametrize(
    ("text", "name", "root", "split", "limit"),
    [
        ("photos/val", "", "photos/val", "validation", None),
        ("/data/calibration.tar,limit=512", "", "/data/calibration.tar", "validation", 512),
        ("torch/cifar10,root=data,split=train,limit=8", "torch/cifar10", "data", "train", 8),
        ("wds/imagenet,root=a=b", "wds/imagenet", "a=b", "validation", None),
        ("torch", "", "torch", "validation", None),
    ],
)
def test_a_text_names_images(text: str, name: str, root: str, split: str, limit: int | None):
    assert ImageSetSpec.parse(text) == ImageSetSpec(name=name, root=root, split=split, limit=limit)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("photos,limt=5", "limt"),
        ("photos,5", "5"),
        ("photos,limit=few", "few"),
        ("photos,limit=", "limit"),
        ("photos,limit=2.5", "2.5"),
        ("photos,limit=0", "limit"),
        ("photos,limit=-3", "limit"),
        ("photos,root=elsewhere", "names no images"),
        (",limit=5", "names no images"),
        ("", "names no images"),
    ],
)
def test_a_bad_text_is_refused_with_what_is_wrong(text: str, named: str):
    with pytest.raises(InputError, match=f"^{text!r}.*{named}"):
        ImageSetSpec.parse(text)


@pytest.mark.parametrize(("length", "limit"), [(10, 3), (10, 5), (7, 7), (1000, 33), (5, 1)])
def test_a_limit_takes_images_evenly_spaced(length: int, limit: int):
    indices = list(ImageSetSpec.parse(f"photos,limit={limit}").indices(length))
    gaps = [later - earlier for earlier, later in zip(indices, [*indices[1:], length], strict=True)]
    assert indices[0] == 0
    assert len(indices) == limit
    assert set(gaps) <= {length // limit, -(-length // limit)}


@pytest.mark.parametrize("limit", ["", ",limit=10", ",limit=11"])
def test_all_images_are_taken_without_a_limit_below_their_number(limit: str):
    assert list(ImageSetSpec.parse(f"photos{limit}").indices(10)) == list(range(10))


@pytest.mark.parametrize(("text", "limit"), [("photos", 5), ("photos,fold=1/2", 5), ("p,limit=9", 5), ("p,limit=3", 3)])
def test_a_set_is_cut_to_a_number_of_images_and_a_lower_limit_stays(text: str, limit: int):
    cut = ImageSetSpec.parse(at_most(text, 5))
    assert cut == dataclasses.replace(ImageSetSpec.parse(text), limit=limit)


def _record(*contents: bytes, spec: str = "photos") -> ImageSetRecord:
    return ImageSetRecord.of(spec, len(contents), [image_digest(content) for content in contents])


def test_sets_that_share_an_image_are_refused_with_the_number_and_both_names():
    evaluation, calibration = _record(b"a", b"b", b"c", spec="val"), _record(b"c", b"x", b"a", spec="cal")
    with pytest.raises(InputError, match=r"2 images of the evaluation set \(val\).*calibration set \(cal\)") as refused:
        evaluation.refuse_overlap(calibration, own_role="evaluation", other_role="calibration")
    assert f"by SHA-256: {image_digest(b'a')}, {image_digest(b'c')};" in str(refused.value)


def test_of_many_shared_images_three_are_named():
    many = _record(*(bytes([i]) for i in range(9)))
    with pytest.raises(InputError, match=r"9 images.*: \w+, \w+, \w+ and 6 more;"):
        many.refuse_overlap(many, own_role="evaluation", other_role="calibration")


@pytest.mark.parametrize("other", [_record(b"x"), ImageSetRecord.of("stream", 5, None), _record()])
def test_sets_that_share_no_known_image_are_accepted(other: ImageSetRecord):
    one = _record(b"a", b"b")
    one.refuse_overlap(other, own_role="evaluation", other_role="calibration")
    other.refuse_overlap(one, own_role="evaluation", other_role="calibration")
    assert not set(one.image_digests) & set(other.image_digests or ())


def test_the_digest_of_a_set_depends_on_its_images_and_not_on_their_order():
    assert _record(b"a", b"b").digest == _record(b"b", b"a").digest
    assert _record(b"a", b"b").digest != _record(b"a", b"c").digest
    assert _record(b"a", b"b").digest != _record(b"a", b"b", b"b").digest


def test_a_record_survives_json():
    for record in (_record(b"a", b"b"), ImageSetRecord.of("stream", 5, None)):
        assert ImageSetRecord.model_validate_json(record.model_dump_json()) == record
