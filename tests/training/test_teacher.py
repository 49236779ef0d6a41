"""A teacher's answer is read back for its own image and seed, and for no other."""

from pathlib import Path

import pytest
import torch

from flora.errors import InputError
from flora.training.teacher import FACTS, TeacherCache, TeacherFacts

IMAGES, SEEDS = [11, 12, 13, 2**63], [1, 2, 2, 2**32 - 1]


def facts(**changes) -> TeacherFacts:
    return TeacherFacts(**{"teacher_sha256": "a", "classes": 6, "top_k": 3, "transform": "t"} | changes)


def answers(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(0)).softmax(1)


@pytest.fixture
def cache(tmp_path: Path) -> TeacherCache:
    cache = TeacherCache(tmp_path / "cache", facts())
    epoch = cache.epoch(0)
    epoch.add(IMAGES, SEEDS, answers())
    epoch.save()
    return cache


def test_answers_come_back_as_they_were_kept(tmp_path: Path):
    epoch = TeacherCache(tmp_path, facts()).epoch(3)
    kept = epoch.add(IMAGES, SEEDS, answers())
    epoch.save()
    found, known = TeacherCache(tmp_path, facts()).epoch(3).find(IMAGES, SEEDS)
    assert known.all()
    assert torch.equal(found, kept)


def test_the_k_largest_are_kept_and_the_rest_is_spread_evenly(cache: TeacherCache):
    found, _ = cache.epoch(0).find(IMAGES, SEEDS)
    largest, classes = answers().topk(3, dim=1)
    torch.testing.assert_close(found.gather(1, classes), largest, atol=1e-3, rtol=0)
    others = torch.ones(4, 6).scatter(1, classes, 0).bool()
    rest = found[others].view(4, 3)
    torch.testing.assert_close(rest, ((1 - largest.sum(1)) / 3)[:, None].expand(4, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(4), atol=1e-5, rtol=0)


def test_with_all_classes_the_answer_is_the_teachers(tmp_path: Path):
    epoch = TeacherCache(tmp_path, facts(top_k=6)).epoch(0)
    torch.testing.assert_close(epoch.add(IMAGES, SEEDS, answers()), answers(), atol=1e-3, rtol=0)


def test_a_subset_in_another_order_reads_its_own_answers(cache: TeacherCache):
    whole, _ = cache.epoch(0).find(IMAGES, SEEDS)
    part, known = cache.epoch(0).find([IMAGES[3], IMAGES[1]], [SEEDS[3], SEEDS[1]])
    assert known.all()
    assert torch.equal(part, whole[[3, 1]])


@pytest.mark.parametrize(("image", "seed", "epoch"), [(11, 2, 0), (12, 1, 0), (14, 1, 0), (11, 1, 1)])
def test_another_image_seed_or_epoch_is_not_known(cache: TeacherCache, image: int, seed: int, epoch: int):
    _, known = cache.epoch(epoch).find([image], [seed])
    assert not known.any()


def test_what_is_added_later_stands_beside_what_was_there(cache: TeacherCache):
    epoch = cache.epoch(0)
    epoch.add([99], [5], answers(1))
    epoch.save()
    _, known = cache.epoch(0).find([*IMAGES, 99], [*SEEDS, 5])
    assert known.all()


@pytest.mark.parametrize("change", [{"teacher_sha256": "b"}, {"transform": "u"}, {"top_k": 2}, {"classes": 7}])
def test_the_folder_of_another_teacher_is_refused(cache: TeacherCache, change: dict):
    with pytest.raises(InputError, match=f"another teacher or augmentation.*{next(iter(change))}"):
        TeacherCache(cache.folder, facts(**change))


def test_a_folder_with_other_things_is_refused(tmp_path: Path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InputError, match=FACTS):
        TeacherCache(tmp_path, facts())


def test_a_truncated_shard_is_named(cache: TeacherCache):
    shard = next(cache.folder.glob("*.npy"))
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(InputError, match=shard.name):
        cache.epoch(0)
