"""A supernet trains, a model folder is fine-tuned, by one function: what it records, resumes, keeps and refuses."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from flora.artifact import sha256_of_file
from flora.errors import InputError
from flora.lowrank.checkpoint import (
    DENSE_WEIGHTS,
    RANK_CONFIG,
    SUPERNET_CONFIG,
    SUPERNET_WEIGHTS,
    LoadedModel,
    ModelConfig,
    load_model_folder,
    load_supernet,
    save_model,
)
from flora.lowrank.weights import read_weights, save_weights
from flora.pipeline.filter import FILTER_REPORT
from flora.pipeline.train import TrainRequest, train
from flora.resume import SETTINGS, Job, WorkFolder
from flora.training.data import TimmImages
from flora.training.evaluate import evaluate
from flora.training.settings import TrainingSettings
from tests.samples import GREY, tiny_args, tiny_model
from tests.worked_example import MODEL, WorkedExample

QUICK = {"epochs": 2, "batch_size": 12, "learning_rate": 1e-3}
FEW = 24


def settings(**changes) -> TrainingSettings:
    return TrainingSettings(**QUICK | changes)


def request(worked: WorkedExample, **changes) -> TrainRequest:
    return TrainRequest(**{"data": f"{worked.training},limit={FEW}", "settings": settings()} | changes)


def stop_in_second_epoch(step: int, steps: int, loss: float) -> None:
    if step == FEW // QUICK["batch_size"] + 1:
        raise KeyboardInterrupt


def stop_at_second_end(figures: dict) -> None:
    if figures["epoch"] == 2:
        raise KeyboardInterrupt


STOPS = {"in an epoch": {"on_step": stop_in_second_epoch}, "at its end": {"on_epoch": stop_at_second_end}}


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of_file(path) for path in folder.iterdir()}


def model_folder(folder: Path, *, seed: int = 7, preprocessing=GREY, **args) -> Path:
    """A dense model of other weights, and of other arguments where they are given."""
    config = ModelConfig(model=MODEL, args=tiny_args(**args), preprocessing=preprocessing)
    save_model(folder, tiny_model(seed=seed, **args), config)
    return folder


# Supernets


def test_training_moves_the_factors_and_keeps_the_dense_model(worked):
    assert sha256_of_file(worked.trained / DENSE_WEIGHTS) == sha256_of_file(worked.filtered / DENSE_WEIGHTS)
    before, after = (read_weights(folder / SUPERNET_WEIGHTS) for folder in (worked.filtered, worked.trained))
    assert before.keys() == after.keys()
    for name in before:
        if name.endswith((".down", ".up")):
            assert not torch.equal(before[name], after[name]), name


def test_a_trained_supernet_keeps_its_space_its_record_and_the_filters_report(worked):
    before, after = load_supernet(worked.filtered).config, load_supernet(worked.trained).config
    assert after.model_copy(update={"training": (), "image_sets": before.image_sets}) == before
    assert (worked.trained / FILTER_REPORT).read_bytes() == (worked.filtered / FILTER_REPORT).read_bytes()
    training = TimmImages(worked.training, GREY).record()
    assert after.image_sets == {**before.image_sets, "training": training}


def test_the_course_of_training_is_recorded(worked):
    (record,) = load_supernet(worked.trained).config.training
    assert (record.images, record.teacher) == (worked.training, "dense")
    assert TrainingSettings.model_validate(record.settings) == settings(batch_size=16, learning_rate=1e-4)
    assert [line["epoch"] for line in record.history] == [1, 2]
    assert all(line.keys() == {"epoch", "loss", "top1_smallest", "top1_largest"} for line in record.history)


def test_the_accuracies_noted_last_are_those_of_the_supernet_that_is_written(worked):
    supernet = load_supernet(worked.trained)
    accuracy = evaluate(supernet.module, TimmImages(worked.selection, GREY).loader(250))
    assert supernet.config.training[0].history[-1]["top1_largest"] == round(accuracy.top1, 3)


@pytest.fixture(scope="module")
def whole(worked: WorkedExample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A supernet trained without interruption: a moving average kept, three subnets in each step, two passes."""
    out = tmp_path_factory.mktemp("training") / "whole"
    train(worked.filtered, out, request(worked, settings=with_all()))
    return out


def with_all() -> TrainingSettings:
    return settings(ema_decay=0.9, sandwich=1, accumulation=2, warmup_epochs=0.5)


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_interrupted_and_resumed_equals_uninterrupted(worked, whole, tmp_path, stop):
    asked = request(worked, settings=with_all())
    with pytest.raises(KeyboardInterrupt):
        train(worked.filtered, tmp_path / "out", asked, **stop)
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    epochs: list[int] = []
    train(worked.filtered, tmp_path / "out", asked, on_epoch=lambda figures: epochs.append(figures["epoch"]))
    assert epochs == [2]
    assert contents(tmp_path / "out") == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def interrupt(step: int, steps: int, loss: float) -> None:
    raise KeyboardInterrupt


def test_a_finished_training_is_not_done_again(worked, whole):
    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}

    before, started = times(), []
    asked = request(worked, settings=with_all())
    again = train(worked.filtered, whole, asked, on_start=started.append, on_step=interrupt)
    assert (started, times()) == ([True], before)
    assert again.config == load_supernet(whole).config


def test_a_finished_training_prepares_nothing(worked, image_folder, tmp_path):
    """Not even the answers of its teacher, whose folder is no setting."""
    asked = request(worked, data=str(image_folder), settings=settings(epochs=1))
    for name in ("first", "second"):
        train(worked.compact, tmp_path / "out", dataclasses.replace(asked, teacher_cache=tmp_path / name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "out"]


@pytest.mark.parametrize("change", [{"settings": settings()}, {"teacher": "none"}, {"restart": True}])
def test_a_finished_training_is_done_again_with_other_settings_or_when_told_to(worked, whole, tmp_path, change):
    out = shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        train(worked.filtered, out, request(worked, **({"settings": with_all()} | change)), on_step=interrupt)
    assert contents(out) == contents(whole)


def test_a_source_that_has_changed_is_trained_again(worked, whole, tmp_path):
    """The space, and what lies beside the factors, count as the factors do; a copy of the folder is the same source."""
    source, out = shutil.copytree(worked.filtered, tmp_path / "source"), shutil.copytree(whole, tmp_path / "out")
    started: list[bool] = []
    asked = request(worked, settings=with_all())
    train(source, out, asked, on_start=started.append, on_step=interrupt)
    assert started == [True]
    originals = {path.name: path.read_bytes() for path in source.iterdir()}
    config, report = (json.loads(originals[name]) for name in (SUPERNET_CONFIG, FILTER_REPORT))
    config["space"]["candidates"][0].pop(1)
    report["blocks"][0]["errors"][0] += 1
    weights = {name: tensor + 0.01 for name, tensor in read_weights(source / DENSE_WEIGHTS).items()}
    for name, content in ((SUPERNET_CONFIG, json.dumps(config)), (FILTER_REPORT, json.dumps(report))):
        (source / name).write_text(content)
        with pytest.raises(KeyboardInterrupt):
            train(source, out, asked, on_step=interrupt)
        shutil.rmtree(tmp_path / "out.work")
        (source / name).write_bytes(originals[name])
    save_weights(source / DENSE_WEIGHTS, weights)
    with pytest.raises(KeyboardInterrupt):
        train(source, out, asked, on_step=interrupt)


def test_killed_between_its_output_and_the_end_it_goes_on_without_training(worked, whole, tmp_path, monkeypatch):
    asked = request(worked, settings=with_all())
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "remove", lambda work: interrupt(0, 0, 0))
        with pytest.raises(KeyboardInterrupt):
            train(worked.filtered, tmp_path / "out", asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.work"]
    train(worked.filtered, tmp_path / "out", asked, on_step=interrupt)
    assert contents(tmp_path / "out") == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_settings_of_the_source_are_not_those_of_what_was_trained(worked, whole):
    """A filtered supernet has a file of that name, too."""
    settings_of = [Job.load(folder / SETTINGS).settings for folder in (worked.filtered, whole)]
    assert ["share" in values for values in settings_of] == [True, False]
    assert ["epochs" in values for values in settings_of] == [False, True]


def relabel(images: Path) -> None:
    """Move one image to the next class, so that it stays where it is in the order of all."""
    (images / "3" / "13.png").rename(images / "4" / "0.png")


def swap(images: Path) -> None:
    """Two images of one class change their places in the order of all."""
    (images / "3" / "13.png").rename(images / "3" / "2.png")


@pytest.mark.parametrize("most", [100, 3], ids=["digests", "too many images for digests"])
@pytest.mark.parametrize("repair", [relabel, swap])
def test_other_labels_or_another_order_of_the_same_images_are_trained_anew(
    worked, image_folder, tmp_path, monkeypatch, repair, most
):
    monkeypatch.setattr("flora.pipeline.images.MOST_DIGESTS", most)
    images = shutil.copytree(image_folder, tmp_path / "images")
    asked = request(worked, data=str(images), settings=settings(epochs=1))
    train(worked.compact, tmp_path / "out", asked)
    train(worked.compact, tmp_path / "out", asked, on_step=interrupt)
    repair(images)
    with pytest.raises(KeyboardInterrupt):
        train(worked.compact, tmp_path / "out", asked, on_step=interrupt)


@pytest.mark.parametrize("most", [100, 3], ids=["digests", "too many images for digests"])
def test_images_that_have_moved_are_the_same_images(worked, image_folder, tmp_path, monkeypatch, most):
    monkeypatch.setattr("flora.pipeline.images.MOST_DIGESTS", most)
    images = shutil.copytree(image_folder, tmp_path / "images")
    train(worked.compact, tmp_path / "out", request(worked, data=str(images), settings=settings(epochs=1)))
    moved = images.rename(tmp_path / "elsewhere")
    for text in (str(moved), f"{moved}/"):
        asked = request(worked, data=text, settings=settings(epochs=1))
        train(worked.compact, tmp_path / "out", asked, on_step=interrupt)


DIFFERENT = {
    "weight decay": ({"settings": settings(weight_decay=0.1)}, "weight_decay: 0.01, now 0.1"),
    "epochs": ({"settings": settings(epochs=3)}, "epochs: 2, now 3"),
    "images": ({"limit": 13}, "images"),
    "teacher": ({"teacher": "none"}, "teacher"),
    "kept answers": ({"teacher_cache": True}, "top_k: null, now 100"),
    "selection images": ({"select_data": True}, "selection"),
    "supernet": ({"source": True}, "source"),
}


@pytest.mark.parametrize(("change", "named"), DIFFERENT.values(), ids=DIFFERENT)
def test_the_stopped_run_of_another_command_is_refused_by_what_differs(worked, tmp_path, change, named):
    with pytest.raises(KeyboardInterrupt):
        train(worked.filtered, tmp_path / "out", request(worked), on_step=stop_in_second_epoch)
    before = contents(tmp_path / "out.work")
    change = dict(change)
    source = worked.trained if change.pop("source", None) else worked.filtered
    if limit := change.pop("limit", None):
        change["data"] = f"{worked.training},limit={limit}"
    if "select_data" in change:
        change["select_data"] = f"{worked.selection},limit=5"
    if "teacher_cache" in change:
        change["teacher_cache"] = tmp_path / "cache"
    with pytest.raises(InputError, match=rf"other settings.*{named}.*--restart"):
        train(source, tmp_path / "out", request(worked, **change))
    assert contents(tmp_path / "out.work") == before
    assert not (tmp_path / "out").exists()


def test_a_stopped_run_goes_on_with_a_lower_rate_and_is_recorded_so(worked, tmp_path):
    out, lower = tmp_path / "out", request(worked, settings=settings(learning_rate=1e-5, precision="bf16"))
    with pytest.raises(KeyboardInterrupt):
        train(worked.filtered, out, request(worked), on_step=stop_in_second_epoch)
    epochs: list[int] = []
    trained = train(worked.filtered, out, lower, on_epoch=lambda figures: epochs.append(figures["epoch"]))
    assert epochs == [2]
    record = trained.config.training[-1]
    assert (record.settings["learning_rate"], record.settings["precision"]) == (1e-5, "bf16")
    assert record.changes == ({"until_epoch": 1, "learning_rate": 1e-3, "precision": "no"},)
    train(worked.filtered, out, lower, on_step=interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(worked.filtered, out, request(worked), on_step=interrupt)


def test_restart_throws_away_what_a_stopped_run_left(worked, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(worked.filtered, tmp_path / "out", request(worked), on_step=stop_in_second_epoch)
    epochs: list[int] = []
    train(
        *(worked.filtered, tmp_path / "out", request(worked, settings=with_all(), restart=True)),
        on_epoch=lambda figures: epochs.append(figures["epoch"]),
    )
    assert epochs == [1, 2]
    assert contents(tmp_path / "out") == contents(whole)


def test_training_goes_on_from_a_trained_supernet_and_adds_to_its_record(worked, whole, tmp_path):
    other = f"{worked.training},limit=13"
    again = train(whole, tmp_path / "out", request(worked, data=other, settings=settings(epochs=1))).config
    before = load_supernet(whole).config
    assert again.training[:-1] == before.training
    assert again.training[-1].images == other
    assert again.image_sets["training"] == TimmImages(other, GREY).record().joined(before.image_sets["training"])


# Model folders


@pytest.fixture(scope="module")
def compact(worked: WorkedExample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compact model, fine-tuned to the dense one."""
    out = tmp_path_factory.mktemp("training") / "compact"
    train(worked.compact, out, request(worked, select_data=worked.selection))
    return out


def test_a_compact_model_is_fine_tuned_at_its_ranks(worked, compact):
    before, after = load_model_folder(worked.compact), load_model_folder(compact)
    assert after.config.ranks == before.config.ranks
    assert (compact / RANK_CONFIG).read_bytes() == (worked.compact / RANK_CONFIG).read_bytes()
    assert after.config.reference == before.config.reference
    states = before.module.state_dict(), after.module.state_dict()
    assert states[0].keys() == states[1].keys()
    assert not torch.equal(states[0]["blocks.0.mlp.fc1.down.weight"], states[1]["blocks.0.mlp.fc1.down.weight"])


def test_a_fine_tuned_model_records_its_training(worked, compact):
    before, after = load_model_folder(worked.compact).config, load_model_folder(compact).config
    (record,) = after.training
    assert [set(line) for line in record.history] == [{"epoch", "loss", "top1"}] * 2
    training = TimmImages(f"{worked.training},limit={FEW}", GREY).record()
    assert after.image_sets == {**before.image_sets, "training": training}
    accuracy = evaluate(load_model_folder(compact).module, TimmImages(worked.selection, GREY).loader(250))
    assert record.history[-1]["top1"] == round(accuracy.top1, 3)


def test_fine_tuning_interrupted_and_resumed_equals_uninterrupted(worked, compact, tmp_path):
    asked = request(worked, select_data=worked.selection)
    with pytest.raises(KeyboardInterrupt):
        train(worked.compact, tmp_path / "out", asked, on_step=stop_in_second_epoch)
    train(worked.compact, tmp_path / "out", asked)
    assert contents(tmp_path / "out") == contents(compact)


def test_a_dense_model_that_learns_from_itself_stays_where_it_is(worked, tmp_path):
    asked = request(worked, settings=settings(epochs=1, optimizer="sgd", weight_decay=0.0))
    trained = train(worked.dense, tmp_path / "out", asked)
    before = load_model_folder(worked.dense).module.state_dict()
    for name, tensor in trained.module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-5)


def test_a_compact_model_without_its_dense_one_needs_another_teacher(worked, tmp_path):
    orphan = shutil.copytree(worked.compact, tmp_path / "orphan")
    config = json.loads((orphan / "config.json").read_text())
    config["reference"]["path"] = str(tmp_path / "gone.safetensors")
    (orphan / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"was not found; .*--teacher FOLDER.*--teacher none"):
        train(orphan, tmp_path / "out", request(worked))
    assert [path.name for path in tmp_path.iterdir()] == ["orphan"]
    trained = train(orphan, tmp_path / "out", request(worked, teacher="none"))
    assert trained.config.training[0].teacher is None


# Teachers


def test_a_foreign_teacher_is_learnt_from(worked, tmp_path):
    """The students of two teachers differ, and each agrees more with its own."""
    folder = model_folder(tmp_path / "teacher")
    long = settings(epochs=6, learning_rate=5e-3, batch_size=8)
    images = TimmImages(f"{worked.training},limit={FEW}", GREY)
    teachers = {"dense": load_model_folder(worked.dense).module, str(folder): load_model_folder(folder).module}
    students = {
        name: train(worked.compact, tmp_path / f"student-{i}", request(worked, teacher=name, settings=long))
        for i, name in enumerate(teachers)
    }
    for name, student in students.items():
        assert student.config.training[0].teacher == name
        distances = {other: divergence(teacher, student, images) for other, teacher in teachers.items()}
        assert min(distances, key=distances.__getitem__) == name, distances


@torch.no_grad()
def divergence(teacher, student: LoadedModel, images: TimmImages) -> float:
    batch, _ = next(iter(images.loader(FEW)))
    logs = [model.eval()(batch).log_softmax(1) for model in (teacher, student.module)]
    return (logs[0].exp() * (logs[0] - logs[1])).sum(1).mean().item()


def test_a_teacher_of_other_classes_is_refused(worked, tmp_path):
    folder = model_folder(tmp_path / "teacher", num_classes=7)
    with pytest.raises(InputError, match=r"has 7 classes, the student 10"):
        train(worked.filtered, tmp_path / "out", request(worked, teacher=str(folder)))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_teacher_of_another_input_size_is_refused(worked, tmp_path):
    larger = GREY.model_copy(update={"input_size": (1, 32, 32)})
    folder = model_folder(tmp_path / "teacher", preprocessing=larger, img_size=32)
    with pytest.raises(InputError, match=r"\(1, 32, 32\), the student of \(1, 28, 28\)"):
        train(worked.filtered, tmp_path / "out", request(worked, teacher=str(folder)))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"teacher": "none", "teacher_cache": Path("cache")}, "leave out the other teacher options"),
        ({"teacher": "none", "teacher_checkpoint": Path("file")}, "leave out the other teacher options"),
        ({"teacher_checkpoint": Path("file")}, "--teacher NAME"),
        ({"teacher": MODEL}, "random weights"),
        ({"teacher": "vit_tiny_patch16_225"}, "vit_tiny_patch16_224"),
    ],
)
def test_teacher_options_that_do_not_belong_together_are_refused(worked, tmp_path, options, says):
    with pytest.raises(InputError, match=says):
        train(worked.filtered, tmp_path / "out", request(worked, **options))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def cached(worked: WorkedExample, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that has filled a teacher's cache, and the cache."""
    root = tmp_path_factory.mktemp("cached")
    train(worked.filtered, root / "first", request(worked, teacher_cache=root / "cache"))
    return root / "first", root / "cache"


def test_a_second_run_reads_the_answers_that_the_first_one_kept(worked, cached, tmp_path):
    first, cache = cached
    shards = contents(cache)
    assert [name for name in sorted(shards) if name.startswith("epoch-")] == ["epoch-0-0-0.npy", "epoch-1-0-0.npy"]
    train(worked.filtered, tmp_path / "again", request(worked, teacher_cache=cache))
    assert contents(tmp_path / "again") == contents(first)
    train(worked.compact, tmp_path / "other", request(worked, teacher_cache=cache))
    assert contents(cache) == shards, "the same teacher, images and seeds: nothing was asked again"


def test_a_run_with_fewer_images_reads_their_answers_and_adds_none(worked, cached, tmp_path):
    _, cache = cached
    shards = contents(cache)
    fewer = request(worked, data=f"{worked.training},limit={FEW}", teacher_cache=cache, settings=settings(epochs=1))
    train(worked.filtered, tmp_path / "out", fewer)
    assert contents(cache) == shards


@pytest.mark.parametrize(
    ("change", "named"),
    [({"settings": settings(augmentation={"erase": 0.5})}, "transform"), ({"top_k": 3}, "top_k")],
    ids=["augmentation", "fewer classes"],
)
def test_a_cache_of_another_augmentation_or_size_is_refused(worked, cached, tmp_path, change, named):
    _, cache = cached
    with pytest.raises(InputError, match=rf"another teacher or augmentation \({named} differ"):
        train(worked.filtered, tmp_path / "out", request(worked, teacher_cache=cache, **change))


def test_a_cache_of_another_teacher_is_refused(worked, cached, tmp_path):
    _, cache = cached
    folder = model_folder(tmp_path / "teacher")
    with pytest.raises(InputError, match=r"teacher_sha256 differ"):
        train(worked.filtered, tmp_path / "out", request(worked, teacher=str(folder), teacher_cache=cache))


def test_answers_of_a_teacher_that_sees_other_pixels_are_not_kept(worked, tmp_path):
    folder = model_folder(tmp_path / "teacher", preprocessing=GREY.model_copy(update={"mean": (0.5,)}))
    with pytest.raises(InputError, match=r"normalization.*--teacher-cache"):
        train(worked.filtered, tmp_path / "out", request(worked, teacher=str(folder), teacher_cache=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


# What is refused before anything is spent


def test_training_on_the_images_to_choose_by_is_refused(worked, tmp_path):
    with pytest.raises(InputError, match=r"images of the training set .* also in the selection set"):
        train(worked.filtered, tmp_path / "out", request(worked, select_data=worked.training))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "says"),
    [("flat", "has no labels, by which the model is judged"), ("classes", "a label 10, the model has 10 classes")],
)
def test_images_that_no_epoch_can_be_judged_by_are_refused_at_once(worked, image_folder, tmp_path, kind, says):
    images = tmp_path / "images"
    for number, path in enumerate(sorted(image_folder.rglob("*.png"))[:11]):
        copy = images / ("" if kind == "flat" else f"{number:02}") / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    with pytest.raises(InputError, match=says):
        train(worked.filtered, tmp_path / "out", request(worked, select_data=str(images)))
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("kind", ["filtered", "compact"])
def test_nothing_is_trained_in_place(worked, tmp_path, kind):
    folder = shutil.copytree(getattr(worked, kind), tmp_path / "model")
    with pytest.raises(InputError, match="another folder with --out"):
        train(folder, folder, request(worked))
    assert contents(folder) == contents(getattr(worked, kind))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_another_kind_is_not_replaced(worked, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=SUPERNET_CONFIG):
        train(worked.filtered, tmp_path, request(worked))
    model = shutil.copytree(worked.compact, tmp_path / "model")
    with pytest.raises(InputError, match=SUPERNET_CONFIG):
        train(worked.filtered, model, request(worked))
    assert contents(model) == contents(worked.compact)


def test_fewer_images_than_one_batch_are_refused_and_then_a_smaller_batch_is_accepted(worked, tmp_path):
    with pytest.raises(InputError, match=r"24 images, fewer than one batch of 25; lower --batch-size"):
        train(worked.filtered, tmp_path / "out", request(worked, settings=settings(batch_size=25)))
    trained = train(worked.filtered, tmp_path / "out", request(worked, settings=settings(batch_size=24, epochs=1)))
    assert len(trained.config.training[-1].history) == 1


def test_a_restart_that_is_refused_throws_nothing_away(worked, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(worked.filtered, tmp_path / "out", request(worked), on_step=stop_in_second_epoch)
    before = contents(tmp_path / "out.work")
    with pytest.raises(InputError, match="fewer than one batch"):
        train(worked.filtered, tmp_path / "out", request(worked, settings=settings(batch_size=25), restart=True))
    assert contents(tmp_path / "out.work") == before


def test_tensorboard_gets_the_course(worked, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    asked = request(worked, select_data=worked.selection, tensorboard=tmp_path / "board")
    trained = train(worked.compact, tmp_path / "out", asked)
    events = event_accumulator.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    noted = [event.value for event in events.Scalars("selection/top1")]
    assert noted == pytest.approx([line["top1"] for line in trained.config.training[-1].history])
