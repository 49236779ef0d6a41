"""Compressing without training: within the budget, better than uniform ranks, resumable, its steps kept."""

import dataclasses
import shutil
import tarfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.benchmark import LatencyStats
from export.bundle import MANIFEST, load_bundle
from export.images import LabelledImages
from flora.artifact import sha256_of_file
from flora.errors import InputError
from flora.imagesets import ImageSetSpec
from flora.lowrank.checkpoint import MODEL_WEIGHTS, load_model, load_model_folder, load_supernet
from flora.lowrank.supernet import active_ranks
from flora.pipeline.build import build
from flora.pipeline.compact import chosen_ranks
from flora.pipeline.compensate import compensate_job
from flora.pipeline.export_request import ExportRequest
from flora.pipeline.images import labels_are_classes
from flora.pipeline.sensitivity import (
    SENSITIVITY,
    SensitivityReport,
    SensitivityRequest,
    allocated_ranks,
    measure_sensitivity,
)
from flora.pipeline.training_free import TrainingFreeRequest, compress_training_free
from flora.pipeline.verify import verify_bundle
from flora.ranks.budget import LatencyBudget
from flora.ranks.config import RankConfig
from flora.ranks.latency import LatencyModel
from flora.resume import SETTINGS
from flora.training.data import TimmImages
from flora.training.selection import SelectionImages, divergences, log_probabilities
from tests.flora_command import leftovers
from tests.pipeline.steps import files, taken
from tests.pipeline.tables import latency_table
from tests.samples import GREY, cost_of
from tests.worked_example import FASHION, WorkedExample

LAYERS = ("qkv", "proj", "fc1", "fc2")
BUDGET, OTHER_BUDGET = "macs=60%", "params=55%"
STEPS = ("factorizing", "probing layers", "materializing", "compensating")
EXPORT = "writing the compact model"


def request(worked: WorkedExample, **changes) -> TrainingFreeRequest:
    defaults = {
        "calib_data": worked.calibration,
        "select_data": f"{worked.selection},limit=40",
        "budget": BUDGET,
        "export": exported(worked),
        "layers": LAYERS,
        "space": "multiples=2",
    }
    return TrainingFreeRequest(**defaults | changes)


def exported(worked: WorkedExample, **changes) -> ExportRequest:
    defaults = {"eval_data": f"{worked.images},limit=20", "repeats": 1, "threads": 1, "max_drop": 100}
    return ExportRequest(**defaults | changes)


def run(worked: WorkedExample, out: Path, asked: TrainingFreeRequest, *, stop_at: str | None = None) -> list[str]:
    """Compress, and return the steps that were taken; with `stop_at`, interrupted where that one begins."""
    return taken(
        lambda note: compress_training_free(load_model(str(worked.dense)), out, asked, on_step=note), stop_at=stop_at
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    out: Path
    steps: list[str]

    @property
    def work(self) -> Path:
        return self.out.with_name(f"{self.out.name}.work")

    @property
    def report(self) -> SensitivityReport:
        return SensitivityReport.load(self.work / "sensitivity" / SENSITIVITY)


@pytest.fixture(scope="module")
def whole(worked: WorkedExample, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A compression without interruption."""
    out = tmp_path_factory.mktemp("training-free") / "bundle"
    return Whole(out=out, steps=run(worked, out, request(worked)))


def test_every_step_is_taken_once_and_in_order(whole):
    assert tuple(whole.steps[: len(STEPS)]) == STEPS
    assert leftovers(whole.out.parent) == []


def test_the_model_in_the_bundle_is_within_the_budget_and_knows_its_images(worked, whole):
    model = load_model_folder(whole.out / "model")
    cost = load_supernet(whole.work / "supernet").config.cost
    assert 0.55 * cost.dense_macs < cost.macs(model.config.ranks) <= 0.6 * cost.dense_macs
    assert {role: record.images for role, record in model.config.image_sets.items()} == {
        "calibration": 64,
        "selection": 40,
    }
    assert set(whole.report.probes) == set(cost.shapes)


def test_factors_are_fitted_again_only_where_that_helps_and_the_bundle_says_so(worked, whole, tmp_path):
    plain, shipped = (load_model_folder(folder) for folder in (whole.work / "compact-macs-60pct", whole.out / "model"))
    images = SelectionImages(TimmImages(f"{worked.selection},limit=40", GREY))
    dense = log_probabilities(load_model(str(worked.dense)).module, images)
    before, after = (
        divergences(dense, log_probabilities(model.module, images)).mean().item() for model in (plain, shipped)
    )
    said = shipped.config.compensation
    assert (said.images, said.before, said.after) == (64, pytest.approx(before), pytest.approx(after))
    assert after < before
    notes = load_bundle(whole.out).manifest.notes
    (note,) = (one for one in notes if not one.startswith("The device was too busy"))
    assert "were fitted again on 64 calibration images: on the selection images the divergence" in note
    assert f"{before:.3g} nats before and {after:.3g} after" in note

    one, out = f"{worked.calibration},limit=1", tmp_path / "compensated"
    compensate_job(
        whole.work / "compact-macs-60pct",
        out,
        calib_data=one,
        select_data=f"{worked.selection},limit=40",
        device=torch.device("cpu"),
    )
    kept = load_model_folder(out)
    assert kept.config.compensation.after >= kept.config.compensation.before
    torch.testing.assert_close(kept.module.state_dict(), plain.module.state_dict(), rtol=0, atol=0)


def test_allocated_ranks_keep_a_trained_model_far_closer_to_dense_than_uniform_ones(tmp_path):
    """The example's ViT at a fifth of its MACs, on images that neither factors nor ranks were chosen on."""
    supernet = build(
        load_model(str(FASHION / "model")),
        tmp_path / "supernet",
        data=f"{FASHION / 'calibration.tar'},limit=96",
        layers=("qkv", "proj", "fc1", "fc2"),
        space="multiples=8",
    )
    selection = SensitivityRequest(select_data=f"{FASHION / 'selection.tar'},limit=32")
    report = measure_sensitivity(supernet.folder, tmp_path / "sensitivity", selection)
    images = SelectionImages(TimmImages(f"{FASHION / 'test.tar'},limit=100", supernet.config.preprocessing))
    dense = log_probabilities(supernet.load_dense().module, images)

    def divergence(ranks: RankConfig) -> float:
        with active_ranks(supernet.module, ranks.ranks):
            found = log_probabilities(supernet.module, images)
        return (dense.exp() * (dense - found)).sum(1).mean().item()

    allocated, uniform = allocated_ranks(supernet, report, "macs=20%"), chosen_ranks(supernet, macs="20%")
    assert 0.19 * supernet.config.cost.dense_macs < allocated.macs <= 0.2 * supernet.config.cost.dense_macs
    assert divergence(allocated) < divergence(uniform) / 2


def test_interrupted_at_every_step_and_resumed_equals_uninterrupted(worked, whole, tmp_path):
    for step in (*STEPS[:2], "probing layers: 5 of 8", *STEPS[2:], EXPORT):
        assert run(worked, tmp_path / "bundle", request(worked), stop_at=step)[-1] == step.partition(":")[0]
    assert not (tmp_path / "bundle").exists()
    work = tmp_path / "bundle.work"
    assert SensitivityReport.load(work / "sensitivity" / SENSITIVITY) == whole.report
    compact = Path("compact-macs-60pct") / MODEL_WEIGHTS
    assert sha256_of_file(work / compact) == sha256_of_file(whole.work / compact)


def test_the_same_command_again_does_nothing(worked, whole):
    before = files(whole.work), files(whole.out)
    assert run(worked, whole.out, request(worked)) == []
    assert (files(whole.work), files(whole.out)) == before


@pytest.mark.parametrize("change", [{"max_drop": 50}, {"repeats": 2}, {"batches": (1, 4, 64)}, {"opset": 18}])
def test_another_option_of_the_export_exports_again_and_does_nothing_else(worked, whole, change):
    before = files(whole.work)
    asked = request(worked, export=exported(worked, **change))
    assert run(worked, whole.out, asked, stop_at=EXPORT) == [EXPORT]
    assert files(whole.work) == before


def test_another_command_line_for_the_same_bundle_does_nothing(worked, whole):
    assert run(worked, whole.out, request(worked, export=exported(worked, command=("flora", "compress")))) == []


def test_evaluation_images_under_other_labels_are_measured_again(worked, whole, image_folder, tmp_path):
    shutil.copytree(whole.work, tmp_path / "bundle.work")
    images = shutil.copytree(image_folder, tmp_path / "images")
    asked = request(worked, export=exported(worked, eval_data=str(images)))
    assert EXPORT in run(worked, tmp_path / "bundle", asked)
    assert run(worked, tmp_path / "bundle", asked) == []
    (images / "3" / "13.png").rename(images / "4" / "0.png")
    assert EXPORT in run(worked, tmp_path / "bundle", asked, stop_at=EXPORT)


@pytest.mark.parametrize("name", [MANIFEST, SETTINGS])
def test_a_damaged_bundle_is_exported_again(worked, whole, tmp_path, name):
    shutil.copytree(whole.work, tmp_path / "bundle.work")
    out = shutil.copytree(whole.out, tmp_path / "bundle")
    (out / name).write_text("{")
    assert EXPORT in run(worked, out, request(worked), stop_at=EXPORT)


def test_another_budget_probes_nothing(worked, whole):
    before = files(whole.work)
    assert run(worked, whole.out, request(worked, budget=OTHER_BUDGET), stop_at=EXPORT) == [*STEPS[2:], EXPORT]
    cost = load_supernet(whole.work / "supernet").config.cost
    ranks = load_model_folder(whole.work / "compact-params-55pct").config.ranks
    assert 0.5 * cost.dense_params < cost.params(ranks) <= 0.55 * cost.dense_params
    assert {name: files(whole.work)[name] for name in before} == before


def test_other_selection_images_are_probed_anew(worked, whole, tmp_path):
    run(worked, tmp_path / "bundle", request(worked), stop_at="materializing")
    other = request(worked, select_data=f"{worked.selection},limit=39")
    assert run(worked, tmp_path / "bundle", other, stop_at="materializing") == ["probing layers", "materializing"]


def test_unfinished_probes_on_other_images_need_a_restart(worked, tmp_path):
    run(worked, tmp_path / "bundle", request(worked), stop_at="probing layers: 3 of 8")
    other = request(worked, select_data=f"{worked.selection},limit=39")
    with pytest.raises(InputError, match=r"unfinished job with other settings \(selection.*--restart"):
        run(worked, tmp_path / "bundle", other)
    again = dataclasses.replace(other, restart=True)
    assert run(worked, tmp_path / "bundle", again, stop_at="materializing") == ["probing layers", "materializing"]


def test_every_fourth_calibration_image_is_held_out_to_choose_by(worked):
    data = f"{FASHION / 'calibration.tar'},limit=60"
    calibration, selection = request(worked, calib_data=data, select_data=None).image_sets
    parts = [TimmImages(text, GREY).record() for text in (calibration, selection)]
    assert not set(parts[0].image_digests) & set(parts[1].image_digests)
    assert ImageSetSpec.parse(selection).fold == ImageSetSpec.parse(calibration).left_out == (1, 4)


def test_a_file_that_is_there_twice_is_named_where_flora_divides_the_images(worked, image_folder, tmp_path):
    images = shutil.copytree(image_folder, tmp_path / "images")
    shutil.copy(images / "0" / "0.png", images / "8" / "copy.png")
    asked = request(worked, calib_data=str(images), select_data=None)
    with pytest.raises(InputError, match=r"holds 1 images twice.*\(0/0\.png is 8/copy\.png\).*--select-data"):
        run(worked, tmp_path / "bundle", asked)


REFUSED = {
    "a budget below the smallest subnet": ({"budget": "macs=1%"}, "below the smallest"),
    "no budget": ({"budget": "50"}, "is no budget"),
    "no such space": ({"space": "sevenths"}, "eighths"),
    "no such layers": ({"layers": ("fc9",)}, "selected by fc9"),
    "images that are not there": ({"calib_data": "nowhere"}, "nowhere"),
    "a part without images to choose by": (
        {"calib_data": f"{FASHION / 'calibration.tar'},fold=1/2", "select_data": None},
        "--select-data",
    ),
    "selection images that are calibration images": (
        {"select_data": f"{FASHION / 'calibration.tar'},limit=10"},
        "calibration set",
    ),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED)
def test_what_a_step_would_refuse_is_refused_before_anything_is_written(worked, tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        run(worked, tmp_path / "bundle", request(worked, **change))
    assert list(tmp_path.iterdir()) == []


def test_a_factorized_model_is_refused(worked, whole, tmp_path):
    with pytest.raises(InputError, match="factorized already"):
        compress_training_free(load_model_folder(whole.out / "model"), tmp_path / "bundle", request(worked))


def test_budgets_of_time_choose_on_a_coarser_grid_than_budgets_of_macs_from_the_same_supernet(worked):
    cost = cost_of((64, 192, 10), (64, 64, 10))
    spaces = {
        budget: request(worked, budget=budget, space=None).space_of(cost)
        for budget in ("macs=50%", "params=1M", "latency=0.6x", "drop=1")
    }
    fine, coarse = tuple(range(8, 64, 8)), (16, 32, 48)
    for budget, ranks in zip(spaces, (fine, fine, coarse, coarse), strict=True):
        assert set(spaces[budget].choices.values()) == {(*ranks, "dense")}
    assert request(worked, budget="latency=0.6x", space="multiples=4").space_of(cost).choices["blocks.0.l1"][0] == 4
    assert request(worked, budget="latency=0.6x", space=None).built_space == "multiples=8"


def test_a_budget_in_milliseconds_goes_by_the_table(worked, tmp_path):
    table = latency_table(worked, tmp_path / "latency.json")
    out = tmp_path / "bundle"
    run(worked, out, request(worked, budget="latency=0.8x", latency_table=tmp_path / "latency.json"))
    ranks = RankConfig.load(out.with_name("bundle.work") / "compact-latency-0.8x" / "ranks.json")
    predicted = LatencyModel(table, batch=8)
    assert ranks.latency_ms == pytest.approx(predicted.ms(ranks.ranks))
    assert ranks.latency_ms <= 0.8 * predicted.dense_ms
    assert all(rank == "dense" for name, rank in ranks.ranks.items() if name.endswith("fc1"))
    assert any(rank != "dense" for rank in ranks.ranks.values())
    assert {stats.batch_size for stats in load_bundle(out).manifest.latency.values()} == {8}


def test_a_layer_whose_pivoted_form_is_fastest_gets_it_also_where_two_factors_would_not_pay(worked, tmp_path):
    latency_table(worked, tmp_path / "latency.json", pivots="fc1")
    out = tmp_path / "bundle"
    run(worked, out, request(worked, budget="latency=0.8x", latency_table=tmp_path / "latency.json"))
    ranks = RankConfig.load(out.with_name("bundle.work") / "compact-latency-0.8x" / "ranks.json")
    cost = load_supernet(out.with_name("bundle.work") / "supernet").config.cost
    assert ranks.pivoted
    assert all(name.endswith("fc1") for name in ranks.pivoted)
    assert any(not cost.shapes[name].is_factored(ranks.ranks[name]) for name in ranks.pivoted)
    bundle = load_bundle(out)
    onnx_file = next(one for one in bundle.manifest.artifacts if one.path == "onnx/model-fp32.onnx")
    assert (onnx_file.macs, onnx_file.params) == (ranks.macs, ranks.params)
    assert ranks.macs < cost.macs(ranks.ranks)
    stages = bundle.manifest.verification.stages
    assert all(stage.passed for stage in stages if stage.kind == "fp32")
    joined = [node for node in onnx.load(out / onnx_file.path).graph.node if node.op_type == "Concat"]
    assert len(joined) >= len(ranks.pivoted)
    assert load_model_folder(out / "model").config.pivoted == ranks.pivoted


@pytest.mark.parametrize("labelled", [True, False])
def test_a_budget_of_points_finds_the_fastest_ranks_that_lose_no_more(worked, tmp_path, labelled):
    table = latency_table(worked, tmp_path / "latency.json")
    selection = f"{worked.selection},limit=40" if labelled else str(unlabelled(tmp_path / "images"))
    out = tmp_path / "bundle"
    asked = request(worked, budget="drop=5", latency_table=tmp_path / "latency.json", select_data=selection)
    steps = run(worked, out, asked)
    assert steps[:5] == [*STEPS[:2], "trying budgets", *STEPS[2:]]
    work = out.with_name("bundle.work")
    ranks, supernet = RankConfig.load(work / "ranks-drop-5" / "ranks.json"), load_supernet(work / "supernet")
    assert ranks.budget == "drop=5"
    assert f"points of {'top-1' if labelled else 'agreement'} lost on 40 selection images" in ranks.origin
    images = SelectionImages(TimmImages(selection, GREY))
    answers = log_probabilities(load_model(str(worked.dense)).module, images).argmax(1)
    wanted = torch.cat([labels for _, labels in images.batches()]) if labelled else answers

    def lost(config: RankConfig) -> float:
        with active_ranks(supernet.module, config.ranks):
            found = log_probabilities(supernet.module, images).argmax(1)
        return 100 * ((answers == wanted).sum() - (found == wanted).sum()).item() / len(wanted)

    latency, report = LatencyModel(table, batch=8), SensitivityReport.load(work / "sensitivity" / SENSITIVITY)
    whole = LatencyBudget.parse("latency=1x", table)
    fastest = whole.cheapest(supernet.config.space, supernet.config.cost)
    least, found = (latency.ms(config) / latency.dense_ms for config in (fastest, ranks.ranks))
    assert least <= found < 1
    assert lost(ranks) <= 5
    if found > least:
        assert lost(allocated_ranks(supernet, report, f"latency={least + 1e-3:.4f}x", table)) > 5
    assert run(worked, out, asked) == []


def test_where_every_model_loses_more_the_dense_one_is_shipped(worked, tmp_path, monkeypatch):
    latency_table(worked, tmp_path / "latency.json")

    def nothing_right(scores, configs, start: int, stop: int) -> list[np.ndarray]:
        return [np.zeros(stop - start, np.float32) for _ in configs]

    monkeypatch.setattr("flora.pipeline.drop.SubnetScores.__call__", nothing_right)
    asked = request(worked, budget="drop=0.5", latency_table=tmp_path / "latency.json")
    run(worked, tmp_path / "bundle", asked)
    ranks = RankConfig.load(tmp_path / "bundle.work" / "ranks-drop-0.5" / "ranks.json")
    assert set(ranks.ranks.values()) == {"dense"}
    assert ranks.origin == "no faster model lost at most 0.5 points of top-1"
    assert load_bundle(tmp_path / "bundle").manifest.recommended is not None


def unlabelled(folder: Path) -> Path:
    """Forty images in two folders that are no classes."""
    for camera in ("left", "right"):
        (folder / camera).mkdir(parents=True)
    with tarfile.open(FASHION / "selection.tar") as tar:
        images = [member for member in tar.getmembers() if member.isfile()][:40]
        for number, member in enumerate(images):
            (folder / ("left", "right")[number % 2] / f"{number}.png").write_bytes(tar.extractfile(member).read())
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "drop=a little"}, "is no drop; write drop=0.5"),
        ({"budget": "drop=1@b2"}, "no batch 2 in fp32"),
        ({"budget": "macs=60%"}, "serves a budget in milliseconds"),
        ({"budget": "latency=0.01x"}, "below the smallest subnet"),
        ({"budget": "latency=0.8x@b4"}, "no batch 4 in fp32"),
        ({"budget": "latency=fast"}, "is no latency"),
    ],
)
def test_a_budget_that_the_table_does_not_serve_is_refused_before_anything_is_made(worked, tmp_path, changes, message):
    latency_table(worked, tmp_path / "latency.json")
    with pytest.raises(InputError, match=message):
        run(worked, tmp_path / "bundle", request(worked, latency_table=tmp_path / "latency.json", **changes))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latency.json"]


@pytest.mark.parametrize(
    ("share", "verdict"),
    [
        (0.9, "the budget is met."),
        (1.03, "the budget is missed by 3.0%, which predictions may be off by."),
        (1.1, "the budget is missed by 10%. If the device was busy, measure again; else ask for less."),
    ],
)
def test_the_bundle_says_whether_the_latency_that_was_asked_for_was_measured(
    worked, tmp_path, monkeypatch, share, verdict
):
    latency_table(worked, tmp_path / "latency.json")

    def timed(runners, images, *, repeats):
        ratios = {name: 0.8 * share if name == "factorized, ONNX Runtime" else 1.0 for name in runners}
        return {
            name: LatencyStats.of(np.full(30, 10 * ratio), np.full(30, 10.0), batch_size=len(images))
            for name, ratio in ratios.items()
        }

    monkeypatch.setattr("flora.pipeline.proof.paired_latency", timed)
    asked = request(worked, budget="latency=0.8x", latency_table=tmp_path / "latency.json")
    run(worked, tmp_path / "bundle", asked)
    note, *_ = load_bundle(tmp_path / "bundle").manifest.notes
    assert note.startswith("Asked was latency=0.8x. Predicted were 0.")
    assert f"measured {0.8 * share:.3f} ({8 * share:.3g} ms) at batch 8 and 1 thread for factorized" in note
    assert note.endswith(verdict)


def test_without_evaluation_images_the_selection_images_serve_and_the_bundle_says_so(worked, whole, tmp_path):
    shutil.copytree(whole.work, tmp_path / "bundle.work")
    asked = request(worked, export=exported(worked, eval_data=None))
    run(worked, tmp_path / "bundle", asked)
    manifest = load_bundle(tmp_path / "bundle").manifest
    assert set(manifest.image_sets) == {"calibration", "selection"}
    assert {stage.images for stage in manifest.verification.stages} == {40}
    assert manifest.verification.stages[0].top1 is not None
    assert any("No evaluation images were given" in note and "flora verify" in note for note in manifest.notes)
    assert run(worked, tmp_path / "bundle", asked) == []
    assert not any("No evaluation images" in note for note in load_bundle(whole.out).manifest.notes)


def test_selection_images_that_show_no_classes_of_the_model_are_judged_by_agreement(worked, whole, tmp_path):
    shutil.copytree(whole.work, tmp_path / "bundle.work")
    images = unlabelled(tmp_path / "images")
    run(worked, tmp_path / "bundle", request(worked, select_data=str(images), export=exported(worked, eval_data=None)))
    manifest = load_bundle(tmp_path / "bundle").manifest
    assert {stage.top1 for stage in manifest.verification.stages} == {None}
    assert any("agreement with the dense model stands in" in note for note in manifest.notes)


def test_an_unfinished_latency_table_of_other_settings_does_not_stop_another_command(worked, tmp_path):
    asked = request(worked, budget="latency=0.9x")
    run(worked, tmp_path / "bundle", asked, stop_at="measuring latency")
    unfinished = tmp_path / "bundle.work" / f"latency-ort-cpu-b8.json{'.work'}"
    before = (unfinished / SETTINGS).read_text()
    other = request(worked, budget="latency=0.9x", layers=("qkv", "fc1"))
    run(worked, tmp_path / "bundle", other, stop_at="measuring latency: 1 of 3 groups")
    assert (unfinished / SETTINGS).read_text() != before


def test_labels_of_another_data_set_do_not_count(worked, image_folder):
    ten, wide = TimmImages(f"{worked.images},limit=20", GREY), TimmImages(str(image_folder), GREY)
    assert labels_are_classes(ten, 10)
    assert labels_are_classes(wide, 10)
    assert not labels_are_classes(ten, 5)
    assert not labels_are_classes(LabelledImages(str(image_folder), GREY), 100)


def test_too_few_calibration_images_are_said(worked, tmp_path):
    asked = request(worked, calib_data=f"{worked.calibration.partition(',')[0]},limit=1")
    run(worked, tmp_path / "bundle", asked)
    cost = load_supernet(tmp_path / "bundle.work" / "supernet").config.cost
    lacking = [layer.name for layer in cost.layers if layer.tokens < layer.in_features]
    assert lacking
    (note,) = (one for one in load_bundle(tmp_path / "bundle").manifest.notes if "fewer tokens than inputs" in one)
    assert lacking[0] in note


def test_a_bundle_for_openvino_was_chosen_verified_and_measured_there(worked, tmp_path):
    export = exported(worked, runtime="openvino")
    run(worked, tmp_path / "bundle", request(worked, export=export))
    manifest = load_bundle(tmp_path / "bundle").manifest
    assert {entry.runtime for entry in manifest.artifacts} == {"openvino"}
    stages = {stage.name: stage for stage in manifest.verification.stages}
    assert stages["factorized, OpenVINO, batch 8"].provider == "OpenVINO CPU, f32"
    assert stages["factorized, OpenVINO, batch 8"].passed
    assert {"dense, OpenVINO", "factorized, OpenVINO"} < set(manifest.latency)
    check = verify_bundle(tmp_path / "bundle", data=f"{worked.images},limit=20", threads=1)
    assert check.passed
    assert {stage.provider for stage in check.report.stages} == {"OpenVINO CPU, f32"}
    table = tmp_path / "latency.json"
    latency_table(worked, table)
    asked = request(worked, budget="latency=0.8x", latency_table=table, export=export)
    with pytest.raises(InputError, match="runtime: ort-cpu, here openvino"):
        run(worked, tmp_path / "other", asked)


def test_a_table_of_other_threads_is_refused(worked, tmp_path):
    latency_table(worked, tmp_path / "latency.json")
    export = exported(worked, threads=2)
    asked = request(worked, budget="latency=0.8x", latency_table=tmp_path / "latency.json", export=export)
    with pytest.raises(InputError, match="threads: 1, here 2"):
        run(worked, tmp_path / "bundle", asked)
