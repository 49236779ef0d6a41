"""A latency table says what ranks cost in milliseconds, where it was measured and nowhere else."""

from dataclasses import replace

import pytest

from flora.errors import InputError
from flora.ranks.allocate import allocate
from flora.ranks.budget import LatencyBudget, check_reachable
from flora.ranks.cost import LayerShape, ModelCost
from flora.ranks.latency import LatencyModel, LatencyTable, ModelLatency, Site, SiteLatency
from flora.ranks.sensitivity import AdditiveModel, LayerSensitivity
from flora.ranks.space import space_from_multiples

DEVICE = {"cpu": "Model T", "cores": "2"}
RUNTIME = {"runtime": "ort-cpu", "onnxruntime": "1.32.0", "threads": "1"}
LAYERS = ("blocks.0.fc1", "blocks.1.fc1")
FIXED_MS, SCALE = 2.0, 1.25
SHAPE = LayerShape(name="fc1", in_features=64, out_features=256, tokens=50)


def site_ms(rank: int | str) -> float:
    return 4.0 if rank == "dense" else 0.5 + rank / 16


def model_at(name: str, *ranks: int | str) -> ModelLatency:
    ms = FIXED_MS + SCALE * sum(map(site_ms, ranks))
    return ModelLatency(name=name, ranks=dict(zip(LAYERS, ranks, strict=True)), batch=8, precision="fp32", ms=ms)


def table(**changes) -> LatencyTable:
    site = SiteLatency(
        site=Site(in_features=64, out_features=256, tokens=50, after=("Add", "Gelu")),
        layers=LAYERS,
        batch=8,
        precision="fp32",
        dense_ms=4.0,
        ranks=(8, 24, 48),
        ms=(site_ms(8), site_ms(24), site_ms(48)),
        spread=0.01,
    )
    models = (model_at("dense", "dense", "dense"), model_at("low", 8, 8), model_at("mixed", 48, 8))
    facts = {"model": "vit", "device": DEVICE, "runtime": RUNTIME, "clocks": {}, "created": "now"}
    return LatencyTable(**{**facts, "sites": (site,), "models": models, **changes})


def test_the_model_finds_the_fixed_part_and_the_scale_and_predicts_other_ranks():
    model = LatencyModel(table(), batch=8)
    assert model.fixed_ms == pytest.approx(FIXED_MS)
    assert model.scale == pytest.approx(SCALE)
    unseen = {LAYERS[0]: 16, LAYERS[1]: "dense"}
    assert model.ms(unseen) == pytest.approx(FIXED_MS + SCALE * (site_ms(16) + 4.0))
    assert model.dense_ms == pytest.approx(FIXED_MS + SCALE * 8.0)
    assert model.errors() == pytest.approx({"dense": 0, "low": 0, "mixed": 0}, abs=1e-9)


def test_nanoseconds_of_layers_add_up_exactly():
    model = LatencyModel(table(), batch=8)
    ranks = {LAYERS[0]: 11, LAYERS[1]: 37}
    assert model.ns(ranks) == model.fixed_ns + sum(model.layer_ns(name, rank) for name, rank in ranks.items())


def test_a_budget_is_a_share_of_the_dense_latency_or_milliseconds_at_a_batch_size():
    dense_ms = FIXED_MS + SCALE * 8.0
    for text, limit_ms in (
        ("latency=0.6x", 0.6 * dense_ms),
        ("latency=7.5ms@b8", 7.5),
        ("latency=.5x@b8", dense_ms / 2),
    ):
        assert LatencyBudget.parse(text, table()).limit == pytest.approx(1e6 * limit_ms, abs=2)
    with pytest.raises(InputError, match="no batch 1 in fp32"):
        LatencyBudget.parse("latency=0.6x@b1", table())


@pytest.mark.parametrize(
    "text", ["latency=", "latency=12", "latency=1.2x", "latency=0x", "latency=6s", "latency=5ms@8"]
)
def test_what_is_no_latency_is_refused(text):
    with pytest.raises(InputError, match=r"is no latency; write latency=0\.6x"):
        LatencyBudget.parse(text, table())


def test_ranks_are_allocated_within_milliseconds_and_a_slow_layer_stays_dense():
    slow = table().sites[0].model_copy(update={"layers": LAYERS[1:], "ms": (4.5, 5.0, 6.0)})
    sites = (table().sites[0].model_copy(update={"layers": LAYERS[:1]}), slow)
    models = [ModelLatency(name="d", ranks={}, batch=8, precision="fp32", ms=FIXED_MS + 8.0)]
    models.append(ModelLatency(name="l", ranks={LAYERS[0]: 8}, batch=8, precision="fp32", ms=FIXED_MS + 5.0))
    budget = LatencyBudget.parse("latency=0.75x", table(sites=sites, models=tuple(models)))
    cost = ModelCost(layers=tuple(replace(SHAPE, name=name) for name in LAYERS), fixed_macs=1, fixed_params=1)
    space = space_from_multiples(cost, 8)
    check_reachable(budget, space, cost)
    spectra = {name: [1.0] * 64 for name in LAYERS}
    errors = AdditiveModel(spectra, dict.fromkeys(LAYERS, LayerSensitivity(rank=8, divergence=1.0)))
    ranks = allocate(errors.choices(space, cost, budget), budget.left_for_layers(cost))
    assert ranks is not None
    assert budget.cost_of(cost, ranks) <= budget.limit
    assert ranks[LAYERS[1]] == "dense"
    assert isinstance(ranks[LAYERS[0]], int)
    with pytest.raises(InputError, match=r"below the smallest subnet; the space reaches from .* ms at batch 8"):
        check_reachable(LatencyBudget.parse("latency=0.1x", table()), space, cost)


def test_a_budget_is_in_reach_where_the_fastest_choices_are_not_the_lowest_ranks():
    slow = table().sites[0].model_copy(update={"ms": (9.0, 9.5, 10.0)})
    models = [model_at(one.name, *one.ranks.values()) for one in table().models]
    models[1:] = [one.model_copy(update={"ms": FIXED_MS + 2 * models[0].ms}) for one in models[1:]]
    budget = LatencyBudget.parse("latency=1x", table(sites=(slow,), models=tuple(models)))
    cost = ModelCost(layers=tuple(replace(SHAPE, name=name) for name in LAYERS), fixed_macs=1, fixed_params=1)
    space = space_from_multiples(cost, 8)
    assert budget.cheapest(space, cost) == cost.dense_ranks
    check_reachable(budget, space, cost)


def test_an_error_is_that_of_a_model_that_the_line_was_not_fitted_to():
    slow = model_at("slow", 24, 24)
    slow = slow.model_copy(update={"ms": 2 * slow.ms})
    model = LatencyModel(table(models=(*table().models, slow)), batch=8)
    assert model.errors()["slow"] == pytest.approx(-0.5)


def test_between_measured_ranks_and_below_time_is_on_a_line_and_above_in_proportion():
    (site,) = table().sites
    assert site.at(16) == pytest.approx(site_ms(16))
    assert site.at(96) == pytest.approx(2 * site_ms(48))
    assert site.at(1) == pytest.approx(site_ms(1))


def test_a_rank_at_which_the_dense_product_is_kept_takes_the_dense_time():
    (site,) = table().sites
    assert site.materialized(51) == pytest.approx(site.at(51))
    assert site.materialized(52) == site.materialized("dense") == 4.0


def test_the_pivoted_form_is_taken_where_it_was_measured_and_is_the_fastest_and_the_rank_then_pays_longer():
    (two,) = table().sites
    site = two.model_copy(update={"pivoted_ranks": (16, 32, 60), "pivoted_ms": (2.0, 2.5, 3.5)})
    assert [site.pivots(rank) for rank in (8, 16, 32, 56, 60, 62, "dense")] == [False] * 2 + [False, True, True] + [
        False
    ] * 2
    assert site.materialized(32) == pytest.approx(2.5)
    assert site.materialized(32, pivoted=True) == pytest.approx(2.5)
    assert 2.5 < site.materialized(48, pivoted=True) < 3.5
    model = LatencyModel(table(sites=(site,)), batch=8)
    ranks = {LAYERS[0]: 8, LAYERS[1]: 60}
    assert model.pivoted(ranks) == (LAYERS[1],)
    assert model.ms(ranks) == pytest.approx(FIXED_MS + SCALE * (site_ms(8) + 3.5))
    assert LatencyModel(table(), batch=8).pivoted(ranks) == ()
    slow = site.model_copy(update={"pivoted_ms": (4.0, 4.0, 4.0)})
    assert slow.fastest_pivoted == []


def test_a_whole_model_is_predicted_in_the_form_that_it_was_measured_in():
    site = table().sites[0].model_copy(update={"pivoted_ranks": (16, 60), "pivoted_ms": (2.0, 3.5)})
    pivoted = model_at("pivoted", 8, 8).model_copy(
        update={
            "ranks": dict.fromkeys(LAYERS, 16),
            "pivoted": LAYERS,
            "ms": FIXED_MS + SCALE * 4.0,
        }
    )
    model = LatencyModel(table(sites=(site,), models=(*table().models, pivoted)), batch=8)
    assert model.errors() == pytest.approx(dict.fromkeys(model.errors(), 0), abs=1e-9)


def test_break_even_is_the_rank_from_which_two_factors_are_not_faster():
    (site,) = table().sites
    slower = [rank for rank in range(1, 64) if site.at(rank) >= site.dense_ms]
    assert site.break_even_rank == slower[0]
    assert site.model_copy(update={"dense_ms": 100.0}).break_even_rank == 64
    assert site.model_copy(update={"dense_ms": 0.1}).break_even_rank == 1


def test_a_table_survives_the_file_and_an_edited_one_is_refused(tmp_path):
    file = tmp_path / "latency.json"
    table().save(file)
    assert LatencyTable.load(file) == table()
    file.write_text(file.read_text().replace('"dense_ms": 4.0', '"dense_ms": 3.0'))
    with pytest.raises(InputError, match="edited or damaged"):
        LatencyTable.load(file)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "deit"}, "model: vit, here deit"),
        ({"device": {**DEVICE, "cores": "8"}}, "cores: 2, here 8"),
        ({"device": {**DEVICE, "gpu": "H100"}}, "gpu: nothing, here H100"),
        ({"runtime": {**RUNTIME, "onnxruntime": "1.33.0"}}, "onnxruntime: 1.32.0, here 1.33.0"),
        ({"layers": {"head": SHAPE}}, "layers without a measurement: head"),
        ({"layers": {LAYERS[1]: replace(SHAPE, tokens=197)}}, "another shape or number of tokens: blocks.1.fc1"),
    ],
)
def test_another_model_device_or_version_is_refused_by_what_differs(changes, named):
    here = {"model": "vit", "layers": dict.fromkeys(LAYERS, SHAPE), "device": DEVICE, "runtime": RUNTIME}
    table().check(**here)
    with pytest.raises(InputError, match=named):
        table().check(**{**here, **changes})


def test_a_batch_that_was_not_measured_is_refused_with_those_that_were():
    with pytest.raises(InputError, match="no batch 1 in fp32, only batch 8 in fp32"):
        LatencyModel(table(), batch=1)


def test_whole_models_that_get_faster_with_their_layers_are_refused():
    upside_down = [one.model_copy(update={"ms": 1 / one.ms}) for one in table().models]
    with pytest.raises(InputError, match="contradicts itself"):
        LatencyModel(table(models=tuple(upside_down)), batch=8)
