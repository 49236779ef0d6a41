"""The paper's road in one call: resumable at every step, its steps kept for other budgets, refused before it spends."""

import dataclasses
import io
import shutil
import tarfile
from pathlib import Path

import pytest
import timm
import torch

from export.bundle import check_hashes, load_bundle
from flora.artifact import sha256_of_file
from flora.errors import BadLossError, InputError
from flora.imagesets import ImageSetSpec
from flora.lowrank.checkpoint import (
    DENSE_WEIGHTS,
    MODEL_WEIGHTS,
    SUPERNET_WEIGHTS,
    ModelConfig,
    load_model,
    load_model_folder,
    load_supernet,
    save_model,
)
from flora.lowrank.weights import read_weights, save_weights
from flora.pipeline.compress import CompressRequest, compress
from flora.pipeline.export_request import ExportRequest
from flora.ranks.config import RankConfig
from flora.ranks.evolution import SearchSettings
from flora.ranks.latency import LatencyModel
from flora.resume import Job, WorkFolder
from flora.training.data import TimmImages
from flora.training.settings import TrainingSettings
from tests.flora_command import leftovers
from tests.pipeline.steps import files, taken
from tests.pipeline.tables import latency_table
from tests.samples import FAMILIES, GREY, tiny_args, tiny_model
from tests.worked_example import FASHION, MODEL, WorkedExample

BUDGET, OTHER_BUDGET = "macs=60%", "macs=75%"
STEPS = ("factorizing", "filtering candidates", "training the supernet", "searching", "materializing", "fine-tuning")
EXPORT = "writing the compact model"


def request(worked: WorkedExample, **changes) -> CompressRequest:
    defaults = {
        "data": worked.training,
        "select_data": f"{worked.selection},limit=40",
        "calib_data": worked.calibration,
        "budget": BUDGET,
        "export": exported(worked),
        "settings": TrainingSettings(epochs=2, batch_size=24, learning_rate=1e-4),
        "finetune_epochs": 1,
        "layers": ("qkv", "fc1", "fc2"),
        "space": "ratios=0.15,0.3,0.5,1",
        "search": SearchSettings.of_size(6, 1),
    }
    return CompressRequest(**defaults | changes)


def exported(worked: WorkedExample, **changes) -> ExportRequest:
    defaults = {"eval_data": f"{worked.images},limit=20", "repeats": 1, "threads": 1, "max_drop": 100}
    return ExportRequest(**defaults | changes)


def quick(**changes) -> TrainingSettings:
    return TrainingSettings(**{"epochs": 1, "batch_size": 24} | changes)


def run(worked: WorkedExample, out: Path, asked: CompressRequest, *, stop_at: str | None = None) -> list[str]:
    """Compress, and return the steps that were taken; with `stop_at`, interrupted where that one begins."""
    return taken(lambda note: compress(load_model(str(worked.dense)), out, asked, on_step=note), stop_at=stop_at)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    out: Path
    steps: list[str]

    @property
    def work(self) -> Path:
        return self.out.with_name(f"{self.out.name}.work")


@pytest.fixture(scope="module")
def whole(worked: WorkedExample, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A compression without interruption."""
    out = tmp_path_factory.mktemp("compressing") / "bundle"
    return Whole(out=out, steps=run(worked, out, request(worked)))


def weights(bundle: Path) -> str:
    return sha256_of_file(bundle / "model" / MODEL_WEIGHTS)


def test_every_step_is_taken_once_and_in_order(whole):
    assert tuple(whole.steps[: len(STEPS)]) == STEPS
    assert leftovers(whole.out.parent) == []


def test_the_model_in_the_bundle_is_within_the_budget_and_has_seen_both_trainings(worked, whole):
    model = load_model_folder(whole.out / "model")
    cost = load_supernet(whole.work / "trained").config.cost
    assert cost.macs(model.config.ranks) <= 0.6 * cost.dense_macs
    assert [len(record.history) for record in model.config.training] == [2, 1]
    assert model.config.ranks == RankConfig.load(whole.work / "search-macs-60pct" / "ranks.json").ranks
    assert weights(whole.out) == sha256_of_file(whole.work / "finetuned-macs-60pct" / MODEL_WEIGHTS)
    assert weights(whole.out) != sha256_of_file(whole.work / "compact-macs-60pct" / MODEL_WEIGHTS)


def test_the_bundle_records_every_image_set_that_was_used(worked, whole):
    sets = load_model_folder(whole.out / "model").config.image_sets
    used = {"calibration": worked.calibration, "selection": f"{worked.selection},limit=40", "training": worked.training}
    assert sets.keys() == used.keys()
    for role, text in used.items():
        assert sets[role].digest == TimmImages(text, GREY).record().digest


def test_interrupted_at_every_step_and_resumed_equals_uninterrupted(worked, whole, tmp_path):
    work = tmp_path / "bundle.work"
    for done, step in enumerate((*STEPS, EXPORT)):
        assert run(worked, tmp_path / "bundle", request(worked), stop_at=step)[-1] == step
        assert sum(path.is_dir() for path in work.glob("*")) == done
    assert not (tmp_path / "bundle").exists()
    for name, file in (("trained", SUPERNET_WEIGHTS), ("finetuned-macs-60pct", MODEL_WEIGHTS)):
        assert sha256_of_file(work / name / file) == sha256_of_file(whole.work / name / file)


def test_interrupted_in_the_middle_of_training_and_resumed_equals_uninterrupted(worked, whole, tmp_path):
    run(worked, tmp_path / "bundle", request(worked), stop_at="training the supernet: step 3 of 4")
    work = tmp_path / "bundle.work"
    assert (work / "trained.work" / "state.pt").is_file()
    assert run(worked, tmp_path / "bundle", request(worked), stop_at="searching")[0] == "training the supernet"
    assert sha256_of_file(work / "trained" / SUPERNET_WEIGHTS) == sha256_of_file(
        whole.work / "trained" / SUPERNET_WEIGHTS
    )


def test_a_second_call_does_no_step_again(worked, whole):
    before = files(whole.work), files(whole.out)
    started: list[bool] = []
    again = compress(load_model(str(worked.dense)), whole.out, request(worked), on_start=started.append)
    assert (started, files(whole.work), files(whole.out)) == ([True], *before)
    assert again == load_bundle(whole.out)
    assert check_hashes(again) == []


def test_moved_with_its_steps_nothing_is_done_again_and_the_dense_model_is_found(worked, whole, tmp_path):
    for path in (whole.out, whole.work):
        shutil.copytree(path, tmp_path / "there" / path.name)
    moved = (tmp_path / "there").rename(tmp_path / "here") / "bundle"
    work = moved.with_name("bundle.work")
    before = files(work)
    assert run(worked, moved, request(worked)) == []
    assert run(worked, moved, request(worked, export=exported(worked, repeats=2)))[0] == EXPORT
    assert {name for name, file in files(work).items() if before[name] != file} == {
        f"compact-macs-60pct/{path.name}" for path in (work / "compact-macs-60pct").iterdir()
    }
    reference = load_model_folder(moved / "model").config.reference
    assert reference.path == str(work / "trained" / DENSE_WEIGHTS)
    assert sha256_of_file(Path(reference.path)) == reference.sha256


def test_another_budget_searches_the_supernet_that_is_there(worked, whole):
    before = files(whole.work)
    steps = run(worked, whole.out, request(worked, budget=OTHER_BUDGET), stop_at=EXPORT)
    assert tuple(steps) == (*STEPS[3:], EXPORT)
    after = files(whole.work)
    assert {name: after[name] for name in before} == before
    assert {name.partition("/")[0] for name in after.keys() - before.keys()} == {
        f"{what}-macs-75pct" for what in ("search", "compact", "finetuned")
    }


def test_without_fine_tuning_the_subnet_is_shipped_as_it_was_found(worked, tmp_path):
    quick = request(worked, finetune_epochs=0, settings=TrainingSettings(epochs=1, batch_size=48))
    assert tuple(run(worked, tmp_path / "bundle", quick, stop_at=EXPORT)) == (*STEPS[:5], EXPORT)
    compact = load_model_folder(tmp_path / "bundle.work" / "compact-macs-60pct")
    assert [len(record.history) for record in compact.config.training] == [1]
    assert not (tmp_path / "bundle.work" / "finetuned-macs-60pct").exists()


LONGER = TrainingSettings(epochs=3, batch_size=24, learning_rate=1e-4)
DIFFERENT = {
    "calibration images": ({"calib_data": None}, "factorizing"),
    "layers": ({"layers": ("fc1", "fc2")}, "factorizing"),
    "space": ({"space": "eighths"}, "factorizing"),
    "share": ({"share": 0.5}, "filtering candidates"),
    "epochs": ({"settings": LONGER}, "training the supernet"),
    "teacher": ({"teacher": "none"}, "training the supernet"),
    "fitness": ({"fitness": "distance"}, "searching"),
    "generations": ({"search": SearchSettings.of_size(6, 2)}, "searching"),
    "fine-tuning": ({"finetune_epochs": 2}, "fine-tuning"),
}


@pytest.mark.parametrize(("change", "first"), DIFFERENT.values(), ids=DIFFERENT)
def test_with_another_setting_the_first_step_that_depends_on_it_is_done_again(worked, whole, change, first):
    before = files(whole.work), files(whole.out)
    assert run(worked, whole.out, request(worked, **change), stop_at=first) == [first]
    assert (files(whole.work), files(whole.out)) == before


def test_what_a_late_setting_does_not_touch_stays(worked, whole):
    kept = {
        name: file for name, file in files(whole.work).items() if name.startswith(("supernet", "filtered", "trained"))
    }
    steps = run(worked, whole.out, request(worked, search=SearchSettings.of_size(6, 2)), stop_at="materializing")
    assert steps == ["searching", "materializing"]
    assert {name: files(whole.work)[name] for name in kept} == kept
    assert run(worked, whole.out, request(worked)) == ["searching"]


def test_a_setting_that_is_taken_back_costs_what_was_done_with_it_and_no_more(worked, whole):
    """The supernet is made again, and it is the one that the later steps came from."""
    assert run(worked, whole.out, request(worked, space="eighths"), stop_at="filtering")[0] == "factorizing"
    assert run(worked, whole.out, request(worked)) == ["factorizing"]


def test_other_weights_behind_the_name_of_the_model_are_compressed_anew(worked, tmp_path):
    folder = shutil.copytree(worked.dense, tmp_path / "model")

    def begun() -> list[str]:
        steps: list[str] = []

        def note(step: str) -> None:
            steps.append(step)
            if step.startswith("filtering"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compress(load_model(str(folder)), tmp_path / "bundle", request(worked), on_step=note)
        return steps

    assert begun() == ["factorizing", "filtering candidates"]
    assert begun() == ["filtering candidates"]
    save_model(folder, tiny_model(seed=7), load_model_folder(folder).config)
    assert begun() == ["factorizing", "filtering candidates"]
    dense = load_supernet(tmp_path / "bundle.work" / "supernet").load_dense().module.state_dict()
    assert all(torch.equal(tensor, dense[name]) for name, tensor in load_model(str(folder)).module.state_dict().items())


@pytest.mark.parametrize(
    ("role", "first"),
    [("calib_data", "factorizing"), ("select_data", "filtering candidates"), ("data", "training the supernet")],
)
def test_other_images_behind_the_same_text_are_read(worked, tmp_path, role, first):
    """A tar of the worked example's images, then with other ones in it."""
    original = {
        "calib_data": worked.calibration,
        "select_data": f"{worked.selection},limit=40",
        "data": worked.training,
    }
    asked = request(worked, **{role: write_images(tmp_path / "images.tar", original[role])})
    run(worked, tmp_path / "bundle", asked, stop_at="searching")
    assert run(worked, tmp_path / "bundle", asked, stop_at="searching") == ["searching"]
    write_images(tmp_path / "images.tar", f"{FASHION / 'test.tar'},fold=2/9,limit=48")
    assert run(worked, tmp_path / "bundle", asked, stop_at="searching")[0] == first


def write_images(path: Path, text: str) -> str:
    """The files of an image set of class folders as a tar of their own."""
    images = TimmImages(text, GREY)
    with tarfile.open(path, "w") as archive:
        for index in images.dataset(lambda image: image).indices:
            file, label = images._source.reader[index]
            content = file.read()
            member = tarfile.TarInfo(f"{label}/{index}.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


# Unfinished steps


def test_a_loss_that_is_no_number_says_how_to_go_on_in_either_training(worked, whole, tmp_path):
    """After an epoch the weights, or what was to be fine-tuned, are damaged."""
    asked = request(worked, budget="macs=65%")
    shutil.copytree(whole.work, tmp_path / "bundle.work")
    run(worked, tmp_path / "bundle", asked, stop_at="fine-tuning")
    compact = tmp_path / "bundle.work" / "compact-macs-65pct"
    state = read_weights(compact / MODEL_WEIGHTS)
    save_weights(compact / MODEL_WEIGHTS, {name: torch.full_like(value, torch.nan) for name, value in state.items()})
    with pytest.raises(BadLossError, match=rf"loss is nan.*flora train {compact} .*flora export"):
        compress(load_model(str(worked.dense)), tmp_path / "bundle", asked)
    huge = request(worked, settings=quick(learning_rate=1e30, schedule="constant", clip_grad=None))
    lower = request(worked, settings=quick(learning_rate=1e-4, schedule="constant", clip_grad=None))
    with pytest.raises(BadLossError, match=r"the same command goes on with these\.$"):
        compress(load_model(str(worked.dense)), tmp_path / "other", huge)
    assert run(worked, tmp_path / "other", lower, stop_at="searching") == ["training the supernet", "searching"]


IN_TRAINING = "training the supernet: step 3 of 4"


@pytest.fixture
def stopped(worked, tmp_path) -> Path:
    """A compression stopped in the second epoch of its supernet."""
    run(worked, tmp_path / "bundle", request(worked), stop_at=IN_TRAINING)
    return tmp_path / "bundle"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"settings": LONGER}, r"other settings \(epochs: 2, now 3\)"),
        ({"share": 0.5}, "filtering candidates anew"),
        ({"layers": ("fc1", "fc2")}, "factorizing anew"),
    ],
)
def test_an_unfinished_step_is_not_thrown_away_by_other_settings(worked, stopped, change, says):
    work = stopped.with_name("bundle.work")
    before = files(work)
    with pytest.raises(InputError, match=rf"trained.work holds an unfinished job.*{says}.*--restart"):
        run(worked, stopped, request(worked, **change))
    assert files(work) == before


def test_restart_throws_the_unfinished_step_away_and_nothing_else(worked, stopped):
    work = stopped.with_name("bundle.work")
    before = files(work)
    step = "training the supernet"
    assert run(worked, stopped, request(worked, settings=LONGER, restart=True), stop_at=step) == [step]
    assert files(work) == {name: file for name, file in before.items() if not name.startswith("trained.work")}


def test_restart_does_nothing_finished_again(worked, whole):
    before = files(whole.work)
    assert run(worked, whole.out, request(worked, restart=True)) == []
    assert files(whole.work) == before


def test_a_restart_that_is_refused_throws_nothing_away(worked, stopped):
    before = files(stopped.with_name("bundle.work"))
    with pytest.raises(InputError, match="below the smallest"):
        run(worked, stopped, request(worked, budget="macs=9%", restart=True))
    assert files(stopped.with_name("bundle.work")) == before


@pytest.mark.parametrize("kind", ["file", "another job"])
def test_what_is_in_the_way_of_the_steps_is_left_alone(worked, tmp_path, kind):
    work = tmp_path / "bundle.work"
    if kind == "file":
        work.write_text("mine")
    else:
        WorkFolder.of(tmp_path / "bundle").open(Job(settings={"epochs": 300}))
    before = files(tmp_path)
    for restart in (False, True):
        with pytest.raises(InputError, match=r"bundle\.work is in the way"):
            run(worked, tmp_path / "bundle", request(worked, restart=restart))
        assert files(tmp_path) == before


# Image sets by default


def test_every_tenth_training_image_is_held_out_to_choose_by(worked):
    data = str(FASHION / "calibration.tar")
    calibration, selection, training = request(worked, data=data, select_data=None, calib_data=None).image_sets
    parts = [TimmImages(text, GREY).record() for text in (calibration, selection, training)]
    assert [part.images for part in parts] == [360, 40, 360]
    parts[1].refuse_overlap(parts[2], own_role="selection", other_role="training")
    parts[1].refuse_overlap(parts[0], own_role="selection", other_role="calibration")
    whole = set(TimmImages(data, GREY).record().image_digests)
    assert set(parts[1].image_digests) | set(parts[2].image_digests) == whole
    assert ImageSetSpec.parse(calibration).limit == 512


@pytest.mark.parametrize("part", ["fold=1/2", "except=1/2", "limit=9"])
def test_a_part_of_a_set_is_not_divided_again(worked, part):
    with pytest.raises(InputError, match="--select-data"):
        _ = request(worked, data=f"{FASHION / 'calibration.tar'},{part}", select_data=None).image_sets


def test_a_file_that_is_there_twice_is_named_where_flora_divides_the_images(worked, image_folder, tmp_path):
    """The first image is held out, its copy is not."""
    images = shutil.copytree(image_folder, tmp_path / "images")
    shutil.copy(images / "0" / "0.png", images / "7" / "copy.png")
    settings = TrainingSettings(epochs=1, batch_size=8)
    asked = request(worked, data=str(images), select_data=None, calib_data=None, settings=settings)
    with pytest.raises(InputError, match=r"holds 1 images twice.*\(0/0\.png is 7/copy\.png\).*--select-data"):
        run(worked, tmp_path / "out", asked)
    (images / "7" / "copy.png").unlink()
    assert run(worked, tmp_path / "out", asked, stop_at=STEPS[0]) == [STEPS[0]]


# What is refused before anything is spent


@pytest.mark.parametrize("role", ["calibration", "selection", "training"])
def test_evaluation_images_that_another_step_sees_are_refused(worked, tmp_path, role):
    seen = {"calibration": worked.calibration, "selection": worked.selection, "training": worked.training}[role]
    asked = request(worked, export=ExportRequest(eval_data=seen))
    steps: list[str] = []
    with pytest.raises(InputError, match=rf"images of the evaluation set .* also in the {role} set"):
        compress(load_model(str(worked.dense)), tmp_path / "out", asked, on_step=steps.append)
    assert (steps, list(tmp_path.iterdir())) == ([], [])


def test_filter_and_search_get_a_part_of_many_selection_images(worked, tmp_path, monkeypatch):
    """A lower limit of the user's stays."""
    monkeypatch.setattr("flora.pipeline.compress.FILTER_IMAGES", 10)
    monkeypatch.setattr("flora.pipeline.compress.SEARCH_IMAGES", 20)
    for name, text, expected in (
        ("all", worked.selection, (10, 20)),
        ("few", f"{worked.selection},limit=15", (10, 15)),
    ):
        asked = request(worked, select_data=text, settings=TrainingSettings(epochs=1, batch_size=48))
        run(worked, tmp_path / name, asked, stop_at="materializing")
        work = tmp_path / f"{name}.work"
        filtered = load_supernet(work / "filtered").config.image_sets["selection"]
        searched = RankConfig.load(work / "search-macs-60pct" / "ranks.json").selection
        assert (filtered.images, searched.images) == expected


@pytest.mark.parametrize(("place", "seen"), [(6, "by filter"), (5, "by search"), (1, "by neither")])
def test_of_the_selection_images_those_that_are_used_are_checked(
    worked, image_folder, tmp_path, monkeypatch, place, seen
):
    """Of twenty images filter takes the places 0, 6, 13, and search 0, 2, 5, 8, 11, 14, 17."""
    monkeypatch.setattr("flora.pipeline.compress.FILTER_IMAGES", 3)
    monkeypatch.setattr("flora.pipeline.compress.SEARCH_IMAGES", 7)
    (tmp_path / "calibration").mkdir()
    shutil.copy(image_folder / TimmImages(str(image_folder), GREY).names()[place], tmp_path / "calibration")
    asked = request(worked, select_data=str(image_folder), calib_data=str(tmp_path / "calibration"))
    if seen == "by neither":
        assert run(worked, tmp_path / "out", asked, stop_at=STEPS[0]) == [STEPS[0]]
        return
    with pytest.raises(InputError, match=r"1 images of the selection set .* also in the calibration set"):
        run(worked, tmp_path / "out", asked)


REFUSED = {
    "a budget below the smallest subnet": ({"budget": "macs=9%"}, r"below the smallest subnet; the space reaches from"),
    "a budget written wrongly": ({"budget": "parms=1M"}, "Did you mean params"),
    "no such space": ({"space": "sevenths"}, "eighths"),
    "no such layers": ({"layers": ("fc9",)}, "selected by fc9"),
    "images that are not there": ({"data": "nowhere"}, "nowhere"),
    "a share that is none": ({"share": 30}, "above 0 and at most at 1"),
    "fp16 without a GPU": ({"settings": quick(precision="fp16")}, "fp16 needs a GPU"),
    "no such optimizer": ({"settings": quick(optimizer="adamm")}, "adamm"),
    "no such schedule": ({"settings": quick(schedule="cosin")}, "cosin"),
    "a batch of more than all images": ({"settings": quick(batch_size=49)}, "fewer than one batch"),
    "passes that do not divide a batch": ({"settings": quick(accumulation=5)}, "does not divide"),
    "mixup of an odd batch": ({"settings": quick(batch_size=15, augmentation={"mixup": 0.8})}, "mix images in pairs"),
    "a teacher without weights": ({"teacher": "vit_tiny_patch16_224"}, "random weights"),
    "a checkpoint of the dense teacher": ({"teacher_checkpoint": Path("file")}, "--teacher NAME"),
    "a checkpoint of no teacher": ({"teacher": "none", "teacher_checkpoint": Path("file")}, "other teacher options"),
    "a warm-up as long as the fine-tuning": (
        {"settings": TrainingSettings(epochs=3, batch_size=24, warmup_epochs=1)},
        "warm-up of 1 epochs does not fit into a run of 1",
    ),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED)
def test_what_a_later_step_would_refuse_is_refused_at_once(worked, tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        run(worked, tmp_path / "out", request(worked, **change))
    assert list(tmp_path.iterdir()) == []


def test_a_compact_model_is_not_compressed_again(worked, tmp_path):
    with pytest.raises(InputError, match="factorized already"):
        compress(load_model(str(worked.compact)), tmp_path / "out", request(worked))
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_does_not_fit_is_refused_at_once(worked, tmp_path):
    config = load_model_folder(worked.dense).config
    larger = config.preprocessing.model_copy(update={"input_size": (1, 32, 32)})
    for name, args, update, says in (
        ("classes", {"num_classes": 7}, {}, "has 7 classes, the student 10"),
        ("input", {"img_size": 32}, {"preprocessing": larger}, r"\(1, 32, 32\), the student of \(1, 28, 28\)"),
    ):
        teacher = tmp_path / name
        save_model(teacher, tiny_model(**args), config.model_copy(update={"args": tiny_args(**args), **update}))
        with pytest.raises(InputError, match=says):
            run(worked, tmp_path / "out", request(worked, teacher=str(teacher)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes", "input"]


def test_the_checkpoint_of_a_teacher_by_name_is_read(worked, tmp_path):
    save_weights(tmp_path / "teacher.safetensors", timm.create_model(MODEL, num_classes=10).state_dict())
    asked = request(worked, teacher=MODEL, teacher_checkpoint=tmp_path / "teacher.safetensors")
    with pytest.raises(InputError, match=r"The teacher takes images of \(3, 224, 224\)"):
        run(worked, tmp_path / "out", asked)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.safetensors"]


def test_a_model_that_cannot_leave_out_patches_is_refused_at_once(worked, tmp_path):
    config = ModelConfig(model=FAMILIES["swin"][0], args=tiny_args("swin"), preprocessing=GREY)
    save_model(tmp_path / "swin", tiny_model("swin"), config)
    asked = request(worked, settings=quick(patch_drop=0.2), budget="macs=90%")
    with pytest.raises(InputError, match="cannot leave out patches"):
        compress(load_model(str(tmp_path / "swin")), tmp_path / "out", asked)
    assert [path.name for path in tmp_path.iterdir()] == ["swin"]


@pytest.mark.parametrize(
    ("role", "says"),
    [
        ("data", "The training images have a label 9, the model has 7"),
        ("select_data", "has a label 9, the model has 7"),
    ],
)
def test_labels_beyond_the_classes_are_refused_at_once(worked, tmp_path, role, says):
    """A model of seven classes; images of ten for one role, of the first seven for the others."""
    args = tiny_args(num_classes=7)
    save_model(tmp_path / "model", tiny_model(num_classes=7), ModelConfig(model=MODEL, args=args, preprocessing=GREY))
    seven = {
        name: first_classes(tmp_path / name, getattr(worked, name)) for name in ("training", "selection", "images")
    }
    sets = {"data": seven["training"], "select_data": seven["selection"]}
    asked = request(
        worked,
        **sets | {role: {"data": worked.training, "select_data": worked.selection}[role]},
        settings=quick(batch_size=8),
        export=ExportRequest(eval_data=seven["images"]),
    )
    with pytest.raises(InputError, match=says):
        compress(load_model(str(tmp_path / "model")), tmp_path / "out", asked)
    assert not (tmp_path / "out.work").exists()


def first_classes(folder: Path, text: object) -> str:
    """The images of the first seven classes of a set, as class folders."""
    images = TimmImages(str(text), GREY)
    for index in images.dataset(lambda image: image).indices:
        file, label = images._source.reader[index]
        if label < 7:
            path = folder / str(label) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read())
    return str(folder)


def test_images_without_labels_are_refused_at_once_where_the_fitness_needs_them(worked, tmp_path):
    (tmp_path / "flat").mkdir()
    for path in Path(first_classes(tmp_path / "classes", worked.selection)).rglob("*.png"):
        path.rename(tmp_path / "flat" / path.name)
    with pytest.raises(InputError, match="has no labels, which the fitness loss needs"):
        run(worked, tmp_path / "out", request(worked, select_data=str(tmp_path / "flat")))
    step = "factorizing"
    asked = request(worked, select_data=str(tmp_path / "flat"), fitness="distance")
    assert run(worked, tmp_path / "out", asked, stop_at=step) == [step]


@pytest.mark.parametrize("role", ["calibration", "training"])
def test_images_to_choose_by_that_another_step_sees_are_refused_at_once(worked, tmp_path, role):
    with pytest.raises(InputError, match=rf"images of the selection set .* also in the {role} set"):
        run(worked, tmp_path / "out", request(worked, select_data=getattr(worked, role)))
    assert list(tmp_path.iterdir()) == []


def test_a_budget_in_milliseconds_is_searched_for_by_the_table_and_held_against_the_measurement(worked, tmp_path):
    table = latency_table(worked, tmp_path / "latency.json")
    asked = request(worked, budget="latency=0.85x", latency_table=tmp_path / "latency.json")
    run(worked, tmp_path / "bundle", asked)
    ranks = RankConfig.load(tmp_path / "bundle.work" / "search-latency-0.85x" / "ranks.json")
    assert ranks.latency_ms <= 0.85 * LatencyModel(table, batch=8).dense_ms
    note, *_ = load_bundle(tmp_path / "bundle").manifest.notes
    assert note.startswith("Asked was latency=0.85x. Predicted were 0.")
    assert run(worked, tmp_path / "bundle", asked) == []


def test_a_latency_that_filtering_has_put_out_of_reach_is_refused_before_the_training(worked, tmp_path):
    """On the table `fc1` is slower factorized, and filtering keeps few of the candidates that leave it dense."""
    latency_table(worked, tmp_path / "latency.json")
    asked = request(worked, budget="latency=0.5998x", latency_table=tmp_path / "latency.json")
    with pytest.raises(InputError, match="below the smallest subnet"):
        run(worked, tmp_path / "bundle", asked)
    steps = {path.name for path in (tmp_path / "bundle.work").iterdir()}
    assert "filtered" in steps
    assert not any(name.startswith("trained") for name in steps)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("macs=60%", "A latency table serves a budget in milliseconds"),
        ("latency=0.01x", "below the smallest subnet"),
        ("drop=1", "Points are for flora compress without training"),
    ],
)
def test_a_latency_that_cannot_be_met_is_refused_before_anything_is_written(worked, tmp_path, budget, message):
    latency_table(worked, tmp_path / "latency.json")
    with pytest.raises(InputError, match=message):
        run(worked, tmp_path / "bundle", request(worked, budget=budget, latency_table=tmp_path / "latency.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["latency.json"]
