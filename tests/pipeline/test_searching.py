"""A search writes ranks within budget and space, the Pareto set, its history and figures, whatever interrupts it."""

import json
import shutil
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flora.artifact import sha256_of_file
from flora.errors import InputError
from flora.lowrank.checkpoint import load_supernet
from flora.pipeline.compact import chosen_ranks, compact_from_supernet
from flora.pipeline.filter import FILTER_REPORT, FilterReport
from flora.pipeline.search import (
    FIGURES,
    HISTORY,
    PARETO,
    ParetoSet,
    SearchHistory,
    SearchOutcome,
    SearchRequest,
    budget_slug,
    plan_search,
    search,
    starting_configs,
)
from flora.ranks.budget import Budget
from flora.ranks.config import RankConfig
from flora.ranks.evolution import SearchSettings, SearchState
from flora.ranks.latency import LatencyModel, LatencyTable
from flora.resume import SETTINGS
from flora.training.data import TimmImages
from flora.training.evaluate import evaluate
from flora.training.selection import SelectionImages, log_probabilities
from tests.flora_command import leftovers
from tests.pipeline.tables import latency_table
from tests.samples import GREY
from tests.worked_example import WorkedExample

QUICK = SearchSettings(population=8, parents=3, mutants=3, crossovers=3, generations=2)
FIRST_ONLY = SearchSettings(population=4, parents=2, mutants=0, crossovers=0, generations=0)


def request(worked: WorkedExample, **changes) -> SearchRequest:
    defaults = {"select_data": worked.selection, "budgets": worked.budgets, "fitness": "distance", "settings": QUICK}
    return SearchRequest(**defaults | changes)


@dataclass(frozen=True, kw_only=True)
class Searched:
    outcome: SearchOutcome
    states: dict[str, SearchState]
    folder: Path


@pytest.fixture(scope="module")
def searched(worked: WorkedExample, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """A search for two budgets without interruption, with the last state of each."""
    folder = tmp_path_factory.mktemp("searching") / "found"
    states: dict[str, SearchState] = {}
    outcome = search(
        *(worked.trained, folder, request(worked)),
        on_generation=lambda state: states.update({state.budget: state}),
    )
    return Searched(outcome=outcome, states=states, folder=folder)


def contents(folder: Path) -> dict[str, str]:
    """All files but the figures, in which plotly writes names of its own."""
    return {path.name: sha256_of_file(path) for path in folder.iterdir() if path.name != FIGURES}


def interrupt(state: SearchState) -> None:
    raise KeyboardInterrupt


def test_a_stopped_search_does_not_go_on_with_its_images_in_another_order(worked, image_folder, tmp_path):
    """Its scores are kept by image."""
    images = shutil.copytree(image_folder, tmp_path / "images")
    asked = request(worked, select_data=str(images))
    with pytest.raises(KeyboardInterrupt):
        search(worked.trained, tmp_path / "found", asked, on_generation=interrupt)
    (images / "3" / "13.png").rename(images / "3" / "2.png")
    with pytest.raises(InputError, match=r"other settings \(selection.*--restart"):
        search(worked.trained, tmp_path / "found", asked)


# Budgets of latency


def test_ranks_for_a_latency_keep_it_by_the_table_and_name_their_pivoted_layers(worked, tmp_path):
    table = latency_table(worked, tmp_path / "latency.json", pivots="qkv")
    asked = request(worked, budgets=("latency=0.85x", "macs=70%"), latency_table=tmp_path / "latency.json")
    outcome = search(worked.trained, tmp_path / "found", asked)
    config, latency = load_supernet(worked.trained).config, LatencyModel(table, batch=8)
    found = outcome.configs["latency=0.85x"]
    assert found.ranks in config.space
    assert found.latency_ms == pytest.approx(latency.ms(found.ranks))
    assert found.latency_ms <= 0.85 * latency.dense_ms
    assert found.pivoted == latency.pivoted(found.ranks)
    assert found.pivoted
    assert found.macs == config.cost.macs(found.ranks, found.pivoted)
    other = outcome.configs["macs=70%"]
    assert (other.latency_ms, other.pivoted) == (None, ())
    compact = compact_from_supernet(load_supernet(worked.trained), found)
    assert compact.config.pivoted == found.pivoted


def test_a_stopped_search_goes_on_by_the_same_table_alone(worked, tmp_path):
    file = tmp_path / "latency.json"
    latency_table(worked, file)
    asked = request(worked, budgets=("latency=0.85x",), latency_table=file)
    with pytest.raises(KeyboardInterrupt):
        search(worked.trained, tmp_path / "found", asked, on_generation=interrupt)
    latency_table(worked, file, pivots="qkv")
    with pytest.raises(InputError, match=r"other settings \(table.*--restart"):
        search(worked.trained, tmp_path / "found", asked)


@pytest.mark.parametrize(
    ("budgets", "has_table", "message"),
    [
        (("latency=0.8x",), False, "For a latency a search needs --latency-table FILE"),
        (("macs=70%",), True, r"A latency table serves a budget such as latency=0\.6x; macs=70% is none"),
        (("latency=0.8x@b4",), True, "no batch 4 in fp32"),
        (("latency=0.01x",), True, "below the smallest subnet"),
        (("drop=1",), False, "Points are for flora compress without training"),
    ],
)
def test_a_latency_that_cannot_be_searched_for_is_refused_at_once(worked, tmp_path, budgets, has_table, message):
    latency_table(worked, tmp_path / "latency.json")
    table = tmp_path / "latency.json" if has_table else None
    with pytest.raises(InputError, match=message):
        search(worked.trained, tmp_path / "found", request(worked, budgets=budgets, latency_table=table))
    assert [path.name for path in tmp_path.iterdir()] == ["latency.json"]


def test_a_table_of_another_version_of_its_runtime_is_refused(worked, tmp_path):
    table = latency_table(worked, tmp_path / "latency.json")
    facts = table.model_dump(exclude={"digest"}) | {"runtime": table.runtime | {"onnxruntime": "0.1"}}
    LatencyTable(**facts).save(tmp_path / "old.json")
    with pytest.raises(InputError, match=r"onnxruntime: 0\.1, here"):
        plan_search(load_supernet(worked.trained), ("latency=0.8x",), tmp_path / "old.json")


# What is written


def test_the_ranks_found_lie_within_their_budget_and_the_space(worked, searched):
    config = load_supernet(worked.trained).config
    record = TimmImages(worked.selection, GREY).record()
    assert list(searched.outcome.files) == list(worked.budgets)
    for text, name in searched.outcome.files.items():
        found = RankConfig.load(searched.folder / name)
        found.check(model=config.model, shapes=config.cost.shapes)
        assert found.ranks in config.space
        assert (found.macs, found.params) == (config.cost.macs(found.ranks), config.cost.params(found.ranks))
        assert found.macs <= Budget.parse(text, config.cost).limit
        assert (found.budget, found.selection) == (text, record)
        assert found == searched.outcome.configs[text]


def test_one_budget_gives_one_file_and_several_one_each(worked, searched, tmp_path):
    shared = {PARETO, HISTORY, FIGURES, SETTINGS}
    assert {path.name for path in searched.folder.iterdir()} == {
        *shared,
        "ranks-macs-70pct.json",
        "ranks-macs-55pct.json",
    }
    search(worked.trained, tmp_path / "out", request(worked, budgets=("params=40K",), settings=FIRST_ONLY))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*shared, "ranks.json"}
    assert RankConfig.load(tmp_path / "out" / "ranks.json").params <= 40_000


def test_a_budget_finds_the_same_alone_and_beside_others(worked, searched, tmp_path):
    alone = search(worked.trained, tmp_path / "out", request(worked, budgets=worked.budgets[1:]))
    assert alone.configs[worked.budgets[1]] == searched.outcome.configs[worked.budgets[1]]


@pytest.mark.parametrize("fitness", ["loss", "top1", "distance", "agreement"])
def test_the_score_is_what_the_materialized_model_shows_on_the_selection_images(worked, tmp_path, fitness):
    asked = request(worked, fitness=fitness, budgets=("macs=70%",), settings=FIRST_ONLY)
    found = search(worked.trained, tmp_path / "out", asked).configs["macs=70%"]
    supernet = load_supernet(worked.trained)
    images = TimmImages(worked.selection, GREY)
    module = compact_from_supernet(supernet, found).module
    accuracy = evaluate(module, images.loader(100))
    logs, dense = (log_probabilities(m, SelectionImages(images)) for m in (module, supernet.load_dense().module))
    expected = {
        "loss": -accuracy.loss,
        "top1": accuracy.top1 / 100,
        "distance": -(dense.exp() * (dense - logs)).sum(1).mean().item(),
        "agreement": (logs.argmax(1) == dense.argmax(1)).double().mean().item(),
    }
    assert found.score == pytest.approx(expected[fitness], rel=1e-3, abs=1e-6)


def test_pareto_json_holds_what_no_other_config_beats(worked, searched):
    front = ParetoSet.load(searched.folder / PARETO)
    complete = [
        one for state in searched.states.values() for one in state.evaluated if one.images == state.images == 100
    ]
    unbeaten = {
        (one.macs, one.score)
        for one in complete
        if not any(
            other.macs <= one.macs and other.score >= one.score and (other.macs, other.score) != (one.macs, one.score)
            for other in complete
        )
    }
    points = [(point.macs, point.score) for point in front.points]
    assert points == sorted(unbeaten)
    assert len(points) > 1
    cost = load_supernet(worked.trained).config.cost
    assert all(cost.macs(point.ranks) == point.macs for point in front.points)
    assert all(cost.params(point.ranks) == point.params for point in front.points)
    assert (front.fitness, front) == ("distance", searched.outcome.pareto)


def test_history_json_holds_every_generation_of_every_budget(worked, searched):
    records = SearchHistory.load(searched.folder / HISTORY).generations
    assert [(one.budget, one.generation) for one in records] == [(b, g) for b in worked.budgets for g in range(3)]
    for text in worked.budgets:
        course = [one for one in records if one.budget == text]
        last, found = course[-1], searched.outcome.configs[text]
        assert [one.best_score for one in course] == sorted(one.best_score for one in course)
        assert (last.best_score, last.best_macs) == (found.score, found.macs)
        assert last.evaluated == len(searched.states[text].evaluated)
        assert [one.evaluated for one in course] == sorted({one.evaluated for one in course})
        assert last.image_forwards == searched.states[text].image_forwards
    assert searched.outcome.image_forwards == sum(one.image_forwards for one in records if one.generation == 2)


class _Links(HTMLParser):
    """What a page would fetch: the `src` and `href` of every element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.scripts = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.found += [f"{tag} {value}" for name, value in attrs if name in ("src", "href", "data")]


def test_the_figures_need_no_network_and_show_every_layer_and_budget(worked, searched):
    page = (searched.folder / FIGURES).read_text(encoding="utf-8")
    links = _Links(page)
    assert links.found == []
    assert links.scripts > 2
    for name in load_supernet(worked.trained).config.layers:
        assert f'"{name}"' in page
    for text in worked.budgets:
        assert f'"{text}"' in page
    assert "Plotly.newPlot" in page


def test_ranks_that_were_found_can_be_materialized(worked, searched):
    supernet = load_supernet(worked.trained)
    for name in searched.outcome.files.values():
        ranks = chosen_ranks(supernet, file=searched.folder / name)
        compact = compact_from_supernet(supernet, ranks).config
        assert compact.ranks == ranks.ranks
        assert compact.image_sets["selection"] == supernet.config.image_sets["selection"]


# Where it begins


@pytest.mark.parametrize("text", ["macs=55%", "macs=70%", "params=40K"])
def test_a_search_of_a_filtered_supernet_begins_with_what_filtering_thinks_best(worked, text):
    config = load_supernet(worked.trained).config
    budget = Budget.parse(text, config.cost)
    starts = starting_configs(worked.trained, config.space, config.cost, budget)
    assert starts
    assert all(ranks in config.space and budget.cost_of(config.cost, ranks) <= budget.limit for ranks in starts)
    assert len({tuple(ranks.values()) for ranks in starts}) == len(starts)
    assert max(budget.cost_of(config.cost, ranks) for ranks in starts) > 0.9 * budget.limit


def test_the_starts_have_less_predicted_error_than_what_is_drawn(worked, searched):
    errors = [
        dict(zip(scores.candidates, scores.errors, strict=True))
        for scores in FilterReport.load(worked.trained / FILTER_REPORT).blocks
    ]
    blocks = load_supernet(worked.trained).config.space.blocks

    def predicted(ranks: dict) -> float:
        return sum(known[tuple(ranks[n] for n in names)] for known, names in zip(errors, blocks, strict=True))

    for state in searched.states.values():
        by_origin: dict[str, list[float]] = {}
        for one in state.evaluated:
            by_origin.setdefault(one.origin, []).append(predicted(one.ranks))
        assert min(by_origin["initial"]) <= min(by_origin["random"])


def test_the_starts_are_evaluated_first_and_without_a_filters_report_there_are_none(worked, searched, tmp_path):
    for state in searched.states.values():
        assert {one.origin for one in state.evaluated if one.generation == 0} >= {"initial"}
        assert "initial" not in {one.origin for one in state.evaluated if one.generation > 0}
    states: list[SearchState] = []
    search(
        *(worked.supernet, tmp_path / "out", request(worked, settings=FIRST_ONLY)),
        on_generation=states.append,
    )
    assert {one.origin for state in states for one in state.evaluated} == {"random"}


# Interrupted, resumed, refused


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_interrupted_after_a_generation_and_resumed_equals_uninterrupted(worked, searched, tmp_path, stop):
    """Three generations a budget: within the first one, between the two, within the second, before the writing."""
    noted: list[tuple[str, int]] = []

    def note(state: SearchState) -> None:
        noted.append((state.budget, state.generation))
        if len(noted) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(worked.trained, tmp_path / "out", request(worked), on_generation=note)
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    search(worked.trained, tmp_path / "out", request(worked), on_generation=note)
    assert noted == [(text, generation) for text in worked.budgets for generation in range(3)]
    assert contents(tmp_path / "out") == contents(searched.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_finished_search_is_not_done_again_and_says_the_same(worked, searched):
    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in searched.folder.iterdir()}

    before, started = times(), []
    again = search(worked.trained, searched.folder, request(worked), on_start=started.append, on_generation=interrupt)
    assert (started, times()) == ([True], before)
    assert again == searched.outcome


@pytest.mark.parametrize("change", [{"fitness": "agreement"}, {"settings": FIRST_ONLY}, {"restart": True}])
def test_a_finished_search_is_done_again_with_other_settings_or_when_told_to(worked, searched, tmp_path, change):
    out = shutil.copytree(searched.folder, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        search(worked.trained, out, request(worked, **change), on_generation=interrupt)
    assert contents(out) == contents(searched.folder)


DIFFERENT = {
    "seed": ({"settings": SearchSettings.of_size(8, 2, seed=1)}, "seed: 0, now 1"),
    "fitness": ({"fitness": "agreement"}, 'fitness: "distance", now "agreement"'),
    "budgets": ({"budgets": ("macs=60%",)}, "budgets"),
    "images": ({"limit": 70}, "selection"),
    "supernet": ({"source": True}, "source"),
}


@pytest.mark.parametrize(("change", "named"), DIFFERENT.values(), ids=DIFFERENT)
def test_the_stopped_search_of_another_command_is_refused_by_what_differs(worked, tmp_path, change, named):
    with pytest.raises(KeyboardInterrupt):
        search(worked.trained, tmp_path / "out", request(worked), on_generation=interrupt)
    before = contents(tmp_path / "out.work")
    change = dict(change)
    source = worked.filtered if change.pop("source", None) else worked.trained
    if limit := change.pop("limit", None):
        change["select_data"] = f"{worked.selection},limit={limit}"
    with pytest.raises(InputError, match=rf"other settings.*{named}.*--restart"):
        search(source, tmp_path / "out", request(worked, **change))
    assert contents(tmp_path / "out.work") == before
    assert not (tmp_path / "out").exists()


def test_a_state_that_was_put_there_from_another_search_is_refused(worked, tmp_path):
    """The settings of the work folder fit, the state inside does not: it is of the supernet before its training."""
    for name, source in (("mine", worked.trained), ("theirs", worked.supernet)):
        with pytest.raises(KeyboardInterrupt):
            search(source, tmp_path / name, request(worked), on_generation=interrupt)
    state = f"search-{budget_slug(worked.budgets[0])}.npz"
    (tmp_path / "theirs.work" / state).replace(tmp_path / "mine.work" / state)
    with pytest.raises(InputError, match="the search space, the model or the latency table differs"):
        search(worked.trained, tmp_path / "mine", request(worked))
    assert not (tmp_path / "mine").exists()


def test_restart_throws_away_what_a_stopped_search_left(worked, searched, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        search(worked.trained, tmp_path / "out", request(worked, fitness="loss"), on_generation=interrupt)
    search(worked.trained, tmp_path / "out", request(worked, restart=True))
    assert contents(tmp_path / "out") == contents(searched.folder)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("role", ["calibration", "training"])
def test_selection_images_that_the_supernet_has_seen_are_refused(worked, tmp_path, role):
    seen = {"calibration": worked.calibration, "training": worked.training}[role]
    with pytest.raises(InputError, match=rf"images of the selection set .* also in the {role} set"):
        search(worked.trained, tmp_path / "out", request(worked, select_data=seen))
    assert list(tmp_path.iterdir()) == []


def test_images_without_labels_need_a_fitness_that_needs_none(worked, image_folder, tmp_path):
    """What the refusal advises is accepted by the next call."""
    (tmp_path / "images").mkdir()
    for path in image_folder.rglob("*.png"):
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    asked = {"select_data": str(tmp_path / "images"), "settings": FIRST_ONLY}
    for fitness in ("loss", "top1"):
        with pytest.raises(InputError, match=r"has no labels.*--fitness distance or agreement"):
            search(worked.trained, tmp_path / "out", request(worked, fitness=fitness, **asked))
        assert [path.name for path in tmp_path.iterdir()] == ["images"]
    found = search(worked.trained, tmp_path / "out", request(worked, fitness="distance", **asked))
    assert all(config.score < 0 for config in found.configs.values())


@pytest.mark.parametrize(
    ("budgets", "says"),
    [
        ((), "needs a budget"),
        (("macs=60%", "macs=10%"), r"below the smallest subnet; the space reaches from 1,151,712 MACs \(35.08%\)"),
        (("macs=60%", "macs=60%"), "given twice"),
        (("mac=60%",), "Did you mean macs"),
        (("macs=sixty",), "no MACs budget"),
    ],
)
def test_budgets_are_refused_before_anything_is_written(worked, tmp_path, budgets, says):
    with pytest.raises(InputError, match=says):
        search(worked.trained, tmp_path / "out", request(worked, budgets=budgets))
    assert list(tmp_path.iterdir()) == []


def test_the_plan_shows_what_can_be_reached(worked):
    supernet = load_supernet(worked.trained)
    plan = plan_search(supernet, worked.budgets)
    macs = {name: plan.cost.macs(ranks) for name, ranks in plan.subnets.items()}
    assert list(macs) == ["smallest", "middle", "largest"]
    assert macs["smallest"] < macs["middle"] < macs["largest"] == plan.cost.dense_macs
    assert all(ranks in supernet.config.space for ranks in plan.subnets.values())


def test_a_folder_of_another_kind_is_not_replaced(worked, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=PARETO):
        search(worked.trained, tmp_path, request(worked))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_every_file_but_the_figures_is_json(searched):
    for path in searched.folder.iterdir():
        if path.name != FIGURES:
            assert json.loads(path.read_text())["schema_version"] == 1
