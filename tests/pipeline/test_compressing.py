"""The paper's road in one call: resumable at every step, its steps kept for other budgets, refused before it spends."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import pytest

from flora.artifact import sha256_of_file
from flora.errors import InputError
from flora.imagesets import ImageSetSpec
from flora.lowrank.checkpoint import (
    MODEL_WEIGHTS,
    SUPERNET_WEIGHTS,
    load_model,
    load_model_folder,
    load_supernet,
)
from flora.pipeline.compress import CompressRequest, compress
from flora.pipeline.export import ExportRequest
from flora.ranks.config import RankConfig
from flora.ranks.evolution import SearchSettings
from flora.training.data import TimmImages
from flora.training.settings import TrainingSettings
from tests.flora_command import leftovers
from tests.samples import GREY
from tests.worked_example import FASHION, WorkedExample

BUDGET, OTHER_BUDGET = "macs=60%", "macs=75%"
STEPS = ("factorizing", "filtering candidates", "training the supernet", "searching", "materializing", "fine-tuning")
EXPORT = "writing the compact model"


def request(worked: WorkedExample, **changes) -> CompressRequest:
    defaults = {
        "data": worked.training,
        "select_data": f"{worked.selection},limit=40",
        "calib_data": worked.calibration,
        "budget": BUDGET,
        "export": ExportRequest(eval_data=f"{worked.images},limit=20", repeats=1, threads=1, max_drop=100),
        "settings": TrainingSettings(epochs=2, batch_size=24, learning_rate=1e-4),
        "finetune_epochs": 1,
        "layers": ("qkv", "fc1", "fc2"),
        "space": "ratios=0.15,0.3,0.5,1",
        "search": SearchSettings.of_size(6, 1),
    }
    return CompressRequest(**defaults | changes)


def run(worked: WorkedExample, out: Path, asked: CompressRequest, *, stop_at: str | None = None) -> list[str]:
    """Compress, and return the steps that were taken; with `stop_at`, interrupted where that one begins."""
    taken: list[str] = []

    def note(step: str) -> None:
        name = step.partition(":")[0]
        if name not in taken:
            taken.append(name)
        if stop_at and step.startswith(stop_at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if stop_at else nullcontext():
        compress(load_model(str(worked.dense)), out, asked, on_step=note)
    return taken


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


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """When and as which file each one under `folder` was written."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}


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
        assert sum(path.is_dir() for path in work.iterdir()) == done
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
    before = files(whole.work)
    assert run(worked, whole.out, request(worked), stop_at=EXPORT) == [EXPORT]
    assert files(whole.work) == before


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


DIFFERENT = {
    "epochs": ({"settings": TrainingSettings(epochs=3, batch_size=24, learning_rate=1e-4)}, "training"),
    "fine-tuning": ({"finetune_epochs": 2}, "finetune_epochs: 1, now 2"),
    "share": ({"share": 0.5}, "share: 0.3, now 0.5"),
    "space": ({"space": "eighths"}, "space"),
    "fitness": ({"fitness": "distance"}, "fitness"),
    "teacher": ({"teacher": "none"}, "teacher"),
    "calibration images": ({"calib_data": None}, "images"),
}


@pytest.mark.parametrize(("change", "named"), DIFFERENT.values(), ids=DIFFERENT)
def test_other_settings_beside_the_steps_of_a_former_call_are_refused(worked, whole, change, named):
    before = files(whole.work), files(whole.out)
    with pytest.raises(InputError, match=rf"other settings.*{named}.*--restart"):
        run(worked, whole.out, request(worked, **change))
    assert (files(whole.work), files(whole.out)) == before


def test_restart_begins_anew(worked, tmp_path):
    run(worked, tmp_path / "bundle", request(worked), stop_at="filtering")
    first = files(tmp_path / "bundle.work")
    run(worked, tmp_path / "bundle", request(worked, share=0.5, restart=True), stop_at="filtering")
    assert files(tmp_path / "bundle.work").keys() == first.keys()
    assert set(files(tmp_path / "bundle.work").values()).isdisjoint(first.values())


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


# What is refused before anything is spent


@pytest.mark.parametrize("role", ["calibration", "selection", "training"])
def test_evaluation_images_that_another_step_sees_are_refused(worked, tmp_path, role):
    seen = {"calibration": worked.calibration, "selection": worked.selection, "training": worked.training}[role]
    asked = request(worked, export=ExportRequest(eval_data=seen))
    steps: list[str] = []
    with pytest.raises(InputError, match=rf"images of the evaluation set .* also in the {role} set"):
        compress(load_model(str(worked.dense)), tmp_path / "out", asked, on_step=steps.append)
    assert (steps, list(tmp_path.iterdir())) == ([], [])


REFUSED = {
    "a budget below the smallest subnet": ({"budget": "macs=9%"}, r"below the smallest subnet; the space reaches from"),
    "a budget written wrongly": ({"budget": "parms=1M"}, "Did you mean params"),
    "no such space": ({"space": "sevenths"}, "eighths"),
    "no such layers": ({"layers": ("fc9",)}, "selected by fc9"),
    "images that are not there": ({"data": "nowhere"}, "nowhere"),
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
