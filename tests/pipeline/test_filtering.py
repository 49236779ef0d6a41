"""Filtering leaves a supernet of the same weights with fewer candidates, whatever interrupts it on the way."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from flora.artifact import sha256_of_file
from flora.errors import InputError
from flora.lowrank.checkpoint import DENSE_WEIGHTS, SUPERNET_CONFIG, SUPERNET_WEIGHTS, load_supernet
from flora.pipeline.filter import FILTER_REPORT, FilterReport, FilterRequest, filter_space
from flora.ranks.filtering import cost_bins, kept_count
from flora.training.data import TimmImages
from flora.training.filtering import BlockScores
from flora.training.settings import training_settings
from tests.flora_command import assert_nothing_at, leftovers
from tests.samples import GREY
from tests.worked_example import WorkedExample


def request(worked: WorkedExample, **changes) -> FilterRequest:
    return FilterRequest(**{"select_data": f"{worked.selection},limit=24"} | changes)


def local(worked: WorkedExample, learning_rate: float) -> FilterRequest:
    settings = training_settings("local", epochs=1, batch_size=24, warmup_epochs=0, learning_rate=learning_rate)
    return request(worked, scorer="local", data=worked.training, settings=settings, share=0.2)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of_file(path) for path in folder.iterdir()}


def times(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}


def interrupt(scores: BlockScores) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def filtered(worked: WorkedExample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worked example's supernet, filtered on a few images without interruption."""
    out = tmp_path_factory.mktemp("filtering") / "filtered"
    filter_space(worked.supernet, out, request(worked))
    return out


def test_weights_and_the_dense_model_stay_as_they_were(worked):
    for name in (SUPERNET_WEIGHTS, DENSE_WEIGHTS):
        assert sha256_of_file(worked.filtered / name) == sha256_of_file(worked.supernet / name)


def test_only_the_candidates_of_the_space_change(worked):
    before, after = load_supernet(worked.supernet).config, load_supernet(worked.filtered).config
    assert (after.space.choices, after.space.blocks) == (before.space.choices, before.space.blocks)
    assert after.space.size < before.space.size
    for index in range(len(before.space.blocks)):
        assert set(after.space.block_candidates(index)) < set(before.space.block_candidates(index))
    assert before.space.smallest() in after.space
    assert before.space.largest() in after.space
    unchanged = {"space": before.space, "image_sets": before.image_sets}
    assert after.model_copy(update=unchanged) == before


def test_the_selection_images_are_recorded_beside_the_calibration_images(worked):
    before, after = load_supernet(worked.supernet).config.image_sets, load_supernet(worked.filtered).config.image_sets
    assert after == {**before, "selection": TimmImages(worked.selection, GREY).record()}


def test_the_report_holds_every_candidate_and_what_stays_is_the_best_of_each_cost_bin(worked):
    before, after = load_supernet(worked.supernet).config, load_supernet(worked.filtered).config
    report = FilterReport.load(worked.filtered / FILTER_REPORT)
    assert (report.scorer, report.share) == ("training-free", 0.3)
    assert tuple(scores.kept for scores in report.blocks) == after.space.candidates
    for index, scores in enumerate(report.blocks):
        assert scores.candidates == before.space.block_candidates(index)
        kept = [candidate in scores.kept for candidate in scores.candidates]
        for group in cost_bins(scores.macs):
            best = sorted(scores.errors[place] for place in group)[: kept_count(0.3, len(group))]
            stays = [place for place in group if kept[place] and place not in (0, len(kept) - 1)]
            assert all(scores.errors[place] <= best[-1] for place in stays)
            assert sum(kept[place] for place in group) >= len(best)


def test_full_rank_has_no_error_and_the_smallest_ranks_have_some(worked):
    for scores in FilterReport.load(worked.filtered / FILTER_REPORT).blocks:
        assert scores.errors[-1] < 1e-6 < scores.errors[0]


def test_a_share_of_one_keeps_every_candidate(worked, tmp_path):
    filtered, _ = filter_space(worked.supernet, tmp_path / "out", request(worked, share=1.0))
    assert filtered.config.space.size == load_supernet(worked.supernet).config.space.size


def test_what_is_filtered_can_be_filtered_again(worked, filtered, tmp_path):
    other = f"{worked.selection},limit=7"
    again, _ = filter_space(filtered, tmp_path / "out", request(worked, select_data=other, share=0.5))
    before = load_supernet(filtered).config
    for mine, theirs in zip(again.config.space.candidates, before.space.candidates, strict=True):
        assert set(mine) < set(theirs)
    seen = TimmImages(other, GREY).record().joined(before.image_sets["selection"])
    assert again.config.image_sets["selection"] == seen


def test_filtering_needs_no_labels(worked, image_folder, tmp_path):
    flat = tmp_path / "images"
    flat.mkdir()
    for path in image_folder.rglob("*.png"):
        (flat / path.name).write_bytes(path.read_bytes())
    labelled, unlabelled = (
        filter_space(worked.supernet, tmp_path / out, request(worked, select_data=str(images)))[1]
        for out, images in (("labelled", image_folder), ("unlabelled", flat))
    )
    for one, other in zip(labelled.blocks, unlabelled.blocks, strict=True):
        assert other.errors == pytest.approx(one.errors, rel=1e-3, abs=1e-6)


def test_interrupted_after_a_block_and_resumed_equals_uninterrupted(worked, filtered, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        filter_space(worked.supernet, tmp_path / "out", request(worked), on_block=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    filter_space(worked.supernet, tmp_path / "out", request(worked))
    assert contents(tmp_path / "out") == contents(filtered)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_block_that_was_scored_is_not_scored_again(worked, filtered, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        filter_space(worked.supernet, tmp_path / "out", request(worked), on_block=interrupt)
    file = tmp_path / "out.work" / "block-0.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_forwards": 12345.0}))
    _, report = filter_space(worked.supernet, tmp_path / "out", request(worked))
    first, second = report.blocks
    assert first.image_forwards == 12345
    assert second == FilterReport.load(filtered / FILTER_REPORT).blocks[1]


def test_a_finished_filter_is_not_done_again(worked, filtered):
    before, started = times(filtered), []
    again, report = filter_space(
        worked.supernet, filtered, request(worked), on_start=started.append, on_block=interrupt
    )
    assert (started, times(filtered)) == ([True], before)
    assert again.config == load_supernet(filtered).config
    assert report == FilterReport.load(filtered / FILTER_REPORT)


@pytest.mark.parametrize("change", [{"share": 0.5}, {"select_data": "other"}, {"source": "other"}, {"restart": True}])
def test_a_finished_filter_is_done_again_with_other_settings_or_when_told_to(worked, filtered, tmp_path, change):
    out = shutil.copytree(filtered, tmp_path / "out")
    change = dict(change)
    source = worked.trained if change.pop("source", None) else worked.supernet
    if "select_data" in change:
        change["select_data"] = f"{worked.selection},limit=11"
    started: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        filter_space(source, out, request(worked, **change), on_start=started.append, on_block=interrupt)
    assert started == [False]
    assert contents(out) == contents(filtered), "what is there stays until the new one is complete"


def test_redone_and_stopped_it_goes_on_with_the_redoing(worked, filtered, tmp_path):
    out = shutil.copytree(filtered, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        filter_space(worked.supernet, out, request(worked, restart=True), on_block=interrupt)
    started: list[bool] = []
    filter_space(worked.supernet, out, request(worked), on_start=started.append)
    assert started == [False]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(out) == contents(filtered)


def test_what_another_command_left_unfinished_stays_beside_a_finished_output(worked, filtered, tmp_path):
    out = shutil.copytree(filtered, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        filter_space(worked.supernet, out, request(worked, share=0.5), on_block=interrupt)
    before = contents(tmp_path / "out.work")
    filter_space(worked.supernet, out, request(worked), on_block=interrupt)
    assert contents(tmp_path / "out.work") == before


@pytest.mark.parametrize(
    ("change", "named"),
    [({"share": 0.5}, "share: 0.3, now 0.5"), ({"select_data": "other"}, "selection"), ({"source": "other"}, "source")],
    ids=["share", "images", "supernet"],
)
def test_the_stopped_run_of_another_command_is_refused_by_what_differs(worked, tmp_path, change, named):
    with pytest.raises(KeyboardInterrupt):
        filter_space(worked.supernet, tmp_path / "out", request(worked), on_block=interrupt)
    change = dict(change)
    source = worked.trained if change.pop("source", None) else worked.supernet
    if "select_data" in change:
        change["select_data"] = f"{worked.selection},limit=11"
    before = contents(tmp_path / "out.work")
    with pytest.raises(InputError, match=rf"other settings.*{named}.*--restart"):
        filter_space(source, tmp_path / "out", request(worked, **change))
    assert contents(tmp_path / "out.work") == before
    assert not (tmp_path / "out").exists()


def test_restart_throws_away_what_a_stopped_run_left(worked, filtered, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        filter_space(worked.supernet, tmp_path / "out", request(worked, share=0.9), on_block=interrupt)
    filter_space(worked.supernet, tmp_path / "out", request(worked, restart=True))
    assert contents(tmp_path / "out") == contents(filtered)
    assert leftovers(tmp_path) == []


def test_a_local_supernet_that_learns_nothing_scores_as_without_training(worked, tmp_path):
    free, _ = filter_space(worked.supernet, tmp_path / "free", request(worked, share=0.2))
    still, report = filter_space(worked.supernet, tmp_path / "still", local(worked, 1e-12))
    assert report.scorer == "local"
    assert still.config.space == free.config.space
    for name in ("free", "still"):
        assert sha256_of_file(tmp_path / name / SUPERNET_WEIGHTS) == sha256_of_file(worked.supernet / SUPERNET_WEIGHTS)


def test_the_local_scorer_trains_a_supernet_for_each_block_and_keeps_none_of_them(worked, tmp_path):
    free, learnt = (
        filter_space(worked.supernet, tmp_path / name, asked)[1]
        for name, asked in (("free", request(worked)), ("local", local(worked, 1e-2)))
    )
    for before, after in zip(free.blocks, learnt.blocks, strict=True):
        assert abs(after.errors[-1] - before.errors[-1]) > 1e-4, "at full rank only training moves the answers"
        assert after.errors != before.errors
    assert sha256_of_file(tmp_path / "local" / SUPERNET_WEIGHTS) == sha256_of_file(worked.supernet / SUPERNET_WEIGHTS)
    assert {path.name for path in (tmp_path / "local").iterdir()} == {path.name for path in worked.filtered.iterdir()}


def test_the_local_scorer_interrupted_and_resumed_equals_uninterrupted(worked, tmp_path):
    asked = local(worked, 1e-2)
    filter_space(worked.supernet, tmp_path / "whole", asked)
    with pytest.raises(KeyboardInterrupt):
        filter_space(worked.supernet, tmp_path / "out", asked, on_block=interrupt)
    filter_space(worked.supernet, tmp_path / "out", asked)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_trained_block_stays_until_its_scores_are_written(worked, tmp_path, monkeypatch):
    asked, state = local(worked, 1e-2), tmp_path / "out.work" / "local-0.pt"
    written = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("flora.pipeline.filter.score_block", lambda *args, **options: interrupt(None))
            with pytest.raises(KeyboardInterrupt):
                filter_space(worked.supernet, tmp_path / "out", asked)
        written.append((state.stat().st_ino, state.stat().st_mtime_ns))
    assert written[0] == written[1], "it was not trained again"
    with pytest.raises(KeyboardInterrupt):
        filter_space(worked.supernet, tmp_path / "out", asked, on_block=interrupt)
    assert {path.name for path in state.parent.iterdir()} == {"settings.json", "block-0.json"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"precision": "fp16"}, "full precision or bf16"),
        ({"optimizer": "adamm"}, "adamm"),
        ({"batch_size": 49}, "48 images, fewer than one batch of 49"),
    ],
)
def test_settings_that_cannot_train_are_refused_before_anything_is_written(worked, tmp_path, change, says):
    asked = local(worked, 1e-2)
    settings = asked.settings.model_copy(update=change)
    with pytest.raises(InputError, match=says):
        filter_space(worked.supernet, tmp_path / "out", dataclasses.replace(asked, settings=settings))
    assert list(tmp_path.iterdir()) == []


def test_another_training_of_the_local_scorer_is_refused_by_the_setting_that_differs(worked, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        filter_space(worked.supernet, tmp_path / "out", local(worked, 1e-2), on_block=interrupt)
    other = dataclasses.replace(local(worked, 1e-2), settings=local(worked, 1e-2).settings.with_epochs(2))
    with pytest.raises(InputError, match=r"other settings \(epochs: 1, now 2\)"):
        filter_space(worked.supernet, tmp_path / "out", other)
    with pytest.raises(KeyboardInterrupt):
        filter_space(worked.supernet, tmp_path / "out", local(worked, 1e-3), on_block=interrupt)


@pytest.mark.parametrize("role", ["calibration", "training"])
def test_selection_images_that_the_supernet_has_seen_are_refused(worked, tmp_path, role):
    seen = {"calibration": worked.calibration, "training": worked.training}[role]
    with pytest.raises(InputError, match=rf"images of the selection set .* also in the {role} set"):
        filter_space(worked.trained, tmp_path / "out", request(worked, select_data=seen))
    assert_nothing_at(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_local_scorer_records_what_it_trained_on(worked, tmp_path):
    filtered, _ = filter_space(worked.supernet, tmp_path / "out", local(worked, 1e-3))
    assert filtered.config.image_sets["training"] == TimmImages(worked.training, GREY).record()


def test_the_local_scorer_does_not_score_on_what_it_trained_on(worked, tmp_path):
    asked = dataclasses.replace(local(worked, 1e-3), select_data=worked.training)
    with pytest.raises(InputError, match=r"48 images of the selection set .* also in the training set"):
        filter_space(worked.supernet, tmp_path / "out", asked)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_that_is_none_is_refused_before_anything_is_written(worked, tmp_path, share):
    with pytest.raises(InputError, match=r"above 0 and at most at 1"):
        filter_space(worked.supernet, tmp_path / "out", request(worked, share=share))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"scorer": "local"},
        {"data": "images"},
        {"scorer": "local", "data": "images"},
        {"settings": training_settings("local")},
    ],
)
def test_the_scorer_its_images_and_its_settings_belong_together(worked, tmp_path, change):
    with pytest.raises(InputError, match="--data IMAGES"):
        filter_space(worked.supernet, tmp_path / "out", request(worked, **change))
    assert list(tmp_path.iterdir()) == []


def test_a_supernet_is_not_filtered_in_place(worked, tmp_path):
    supernet = shutil.copytree(worked.supernet, tmp_path / "supernet")
    with pytest.raises(InputError, match="another folder with --out"):
        filter_space(supernet, supernet, request(worked))
    assert contents(supernet) == contents(worked.supernet)


def test_a_folder_of_another_kind_is_not_replaced(worked, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=SUPERNET_CONFIG):
        filter_space(worked.supernet, tmp_path, request(worked))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
