"""A latency table of a real model on a real runtime, on a clock on which products take time by their size."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from export.attestation import attest
from export.graphs import linear_sites
from export.onnx import onnx_from_module
from export.runtimes import RUNTIMES
from flora.errors import BackendMissingError, FloraError, InputError
from flora.lowrank.checkpoint import LoadedModel, ModelConfig
from flora.lowrank.targets import find_targets, trace_cost
from flora.pipeline import latency
from flora.pipeline.latency import LatencyRequest, _measured_ranks, _pivoted_ranks, measure_latency
from flora.pipeline.subjects import Graphs, Modules
from flora.provenance import clocks
from flora.ranks.latency import LatencyModel, LatencyTable, Site
from tests.clocked_device import NS_A_MAC, ClockedDevice, weights_of_graph, weights_of_module
from tests.samples import GREY, IMAGE, random_images, random_ranks, tiny_args, tiny_model

LAYERS = ("qkv", "proj", "fc1", "fc2")
REQUEST = LatencyRequest(layers=LAYERS, batches=(1, 4), points=3)


@pytest.fixture
def device(monkeypatch) -> ClockedDevice:
    return ClockedDevice(monkeypatch)


@pytest.fixture
def model() -> LoadedModel:
    config = ModelConfig(model="vit_tiny_patch16_224", args=tiny_args(), preprocessing=GREY)
    return LoadedModel(module=tiny_model(), config=config)


@pytest.mark.parametrize("runtime", ["ort-cpu", "torch"])
def test_a_table_predicts_models_that_it_has_not_seen(device, model, tmp_path, runtime):
    torch.set_num_threads(REQUEST.threads)
    table = measure_latency(model, tmp_path / "latency.json", replace(REQUEST, runtime=runtime))
    assert table.runtime["runtime"] == runtime
    assert LatencyTable.load(tmp_path / "latency.json") == table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latency.json"]
    cost = trace_cost(model.module, find_targets(model.module, LAYERS), IMAGE)
    for batch in REQUEST.batches:
        predicted = LatencyModel(table, batch=batch)
        assert max(map(abs, predicted.errors().values())) < 1e-3
        for seed in range(3):
            ranks = random_ranks(cost, seed)
            pivoted = predicted.pivoted(ranks)
            weights = sum(cost.shapes[name].weights(rank, pivoted=name in pivoted) for name, rank in ranks.items())
            dense = sum(layer.dense_weights for layer in cost.layers)
            slower_ms = NS_A_MAC * batch * (dense - weights) / 1e6
            assert predicted.dense_ms - predicted.ms(ranks) == pytest.approx(slower_ms, rel=0.05)


def test_stopped_it_goes_on_and_times_nothing_twice(device, model, tmp_path):
    whole = measure_latency(model, tmp_path / "whole.json", REQUEST)
    needed, device.opened = device.opened, 0

    class StoppedError(Exception):
        pass

    def stop(done: int, of: int, what: str) -> None:
        if done == 5:
            raise StoppedError

    out = tmp_path / "latency.json"
    with pytest.raises(StoppedError):
        measure_latency(model, out, REQUEST, on_group=stop)
    assert not out.exists()
    assert 0 < device.opened < needed
    resumed = measure_latency(model, out, REQUEST)
    assert device.opened == needed
    assert resumed.sites == whole.sites
    assert resumed.models == whole.models


def test_a_device_that_changes_its_speed_between_groups_gives_the_same_table(device, model, tmp_path):
    steady = measure_latency(model, tmp_path / "steady.json", REQUEST)

    def slower(done: int, of: int, what: str) -> None:
        device.speed = 1.5 if done in (1, 9) else 1.0

    drifting = measure_latency(model, tmp_path / "drifting.json", REQUEST, on_group=slower)
    for one, other in zip(steady.sites, drifting.sites, strict=True):
        for times in ("dense_ms", "ms", "pivoted_ms"):
            assert getattr(other, times) == pytest.approx(getattr(one, times), rel=1e-6)
    assert [one.ms for one in drifting.models] == pytest.approx([one.ms for one in steady.models], rel=1e-6)


def test_a_finished_table_is_left_alone_unless_more_is_asked_for(device, model, tmp_path, monkeypatch):
    out = tmp_path / "latency.json"
    first = measure_latency(model, out, REQUEST)
    device.opened, said = 0, []
    assert measure_latency(model, out, REQUEST, on_start=said.append) == first
    assert (device.opened, said) == (0, [True])
    more = LatencyRequest(layers=LAYERS, batches=(1, 4, 2), points=3)
    assert measure_latency(model, out, more).conditions == [(1, "fp32"), (4, "fp32"), (2, "fp32")]
    monkeypatch.setattr(latency, "device_facts", lambda: {"cpu": "another"})
    assert measure_latency(model, out, REQUEST).device == {"cpu": "another"}


def test_what_is_no_table_is_not_replaced(device, model, tmp_path):
    out = tmp_path / "notes.json"
    out.write_text("{}")
    with pytest.raises(InputError, match="It is not replaced"):
        measure_latency(model, out, REQUEST)
    assert out.read_text() == "{}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runtime": "ort"}, "no runtime; give one of .* Did you mean"),
        ({"runtime": "torch-compiled"}, "not measured on torch-compiled; flora bench times whole models on it"),
        ({"precisions": ("fp16",)}, "ort-cpu is measured in fp32 and int8, given: fp16"),
        ({"batches": (0,)}, "at least 1, given: 0"),
        ({"minutes": 0}, "Minutes to measure for must be more than 0"),
        ({"points": 1}, "At least 2 points"),
    ],
)
def test_requests_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        LatencyRequest(**{"layers": LAYERS, **changes})


def test_a_measurement_that_is_out_of_time_goes_on_with_the_same_call(device, model, tmp_path, monkeypatch):
    out, groups = tmp_path / "latency.json", []
    monkeypatch.setattr("flora.pipeline.latency.time.monotonic", lambda: 60.0 * len(groups))
    short = replace(REQUEST, minutes=2.5)

    def measure() -> LatencyTable:
        return measure_latency(model, out, short, on_group=lambda done, of, what: groups.append((done, of)))

    with pytest.raises(FloraError, match=r"After 2\.5 minutes 3 of (\d+) groups are measured\. The same command"):
        measure()
    assert [done for done, _ in groups] == [0, 1, 2]
    total = groups[0][1]
    while not out.is_file():
        with suppress(FloraError):
            measure()
    assert [done for done, _ in groups] == list(range(total))
    assert len(LatencyTable.load(out).sites) + len(REQUEST.conditions) == total


def test_torch_must_run_the_threads_that_the_table_is_for(model, tmp_path):
    with pytest.raises(InputError, match=r"torch runs \d+ threads, the table is to be for 9"):
        measure_latency(model, tmp_path / "latency.json", replace(REQUEST, runtime="torch", threads=9))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_torch_on_a_gpu_that_is_not_there_is_refused_before_anything_is_written(model, tmp_path):
    with pytest.raises(BackendMissingError, match="torch finds no GPU here"):
        measure_latency(model, tmp_path / "latency.json", replace(REQUEST, runtime="torch-cuda"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["dense", "factors", "pivoted"])
def test_torch_times_what_the_graphs_hold(model, tmp_path, precision, form):
    """A layer in the two worlds has the same weights and gives as many outputs; so have whole models."""
    cost = trace_cost(model.module, find_targets(model.module, LAYERS), IMAGE)
    onnx_from_module(model.module, tmp_path / "dense.onnx", preprocessing=GREY)
    dense = onnx.load(tmp_path / "dense.onnx")
    graphs = Graphs(dense, cost, tmp_path, runtime="ort-cpu", threads=1)
    modules = Modules(model.module, cost, runtime="torch")
    rank = "dense" if form == "dense" else 5
    for site in set(linear_sites(dense, cost.shapes).values()):
        rows = np.ones((2, site.tokens, site.in_features), np.float32)
        with (
            graphs.layer(site, rank, 2, "fp32", pivoted=form == "pivoted") as graph,
            modules.layer(site, rank, 2, precision, pivoted=form == "pivoted") as module,
        ):
            assert module(rows).shape == graph(rows).shape
            module.bind(rows)()
            assert weights_of_module(module._module) == weights_of_graph(tmp_path / "layer.onnx")
    ranks = dict.fromkeys(cost.shapes, rank)
    pivoted = tuple(ranks) if form == "pivoted" else ()
    images = random_images(2).numpy()
    with graphs.model(ranks, pivoted, 2, "fp32") as graph, modules.model(ranks, pivoted, 2, precision) as module:
        assert module(images).shape == graph(images).shape
        in_layers = sum(cost.shapes[name].weights(rank, pivoted=form == "pivoted") for name in cost.shapes)
        assert weights_of_module(module._module) == in_layers


def test_a_gpu_and_its_driver_are_part_of_the_device(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$1" in *name*) echo "NVIDIA H100, 580.65";; *) echo "1980, 2619";; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert LatencyRequest(layers=LAYERS, runtime="ort-cuda").device_facts["gpu"] == "NVIDIA H100"
    assert LatencyRequest(layers=LAYERS, runtime="tensorrt").device_facts["driver"] == "580.65"
    assert "gpu" not in REQUEST.device_facts
    assert clocks()["gpu MHz"] == "1980"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert "gpu" not in LatencyRequest(layers=LAYERS, runtime="ort-cuda").device_facts


def test_a_factorized_model_is_refused(model, tmp_path):
    config = model.config.model_copy(update={"ranks": {"blocks.0.attn.qkv": 3}})
    with pytest.raises(InputError, match="measure the dense model"):
        measure_latency(LoadedModel(module=model.module, config=config), tmp_path / "latency.json", REQUEST)


def test_a_runtime_that_is_not_installed_is_said(monkeypatch):
    of_tomorrow = replace(RUNTIMES["openvino"], packages=("openvino-of-tomorrow",))
    monkeypatch.setitem(RUNTIMES, "openvino", of_tomorrow)
    with pytest.raises(BackendMissingError, match="openvino needs openvino-of-tomorrow"):
        _ = LatencyRequest(layers=LAYERS, runtime="openvino").runtime_facts


def test_shapes_are_measured_at_ranks_that_kernels_run_fast_and_at_the_break_even():
    site = Site(in_features=384, out_features=1536, tokens=197)
    *below, top = _measured_ranks(site, 8)
    assert top == 308
    assert len(below) == 7
    assert not any(rank % 16 for rank in below)
    assert below[0] == 16
    pivoted = _pivoted_ranks(site, 8)
    assert pivoted == (96, 192, 288, 368)
    small = Site(in_features=48, out_features=48, tokens=5)
    assert _measured_ranks(small, 3) == (1, 12, 24)
    assert _pivoted_ranks(small, 3) == (16, 32)


@pytest.mark.parametrize("rank", ["dense", 8])
def test_a_layer_timed_in_int8_computes_in_int8(model, tmp_path, rank):
    path, cost = tmp_path / "dense.onnx", trace_cost(model.module, find_targets(model.module, LAYERS), IMAGE)
    onnx_from_module(model.module, path, preprocessing=GREY)
    graphs = Graphs(onnx.load(path), cost, tmp_path, runtime="ort-cpu", threads=1)
    site = Site(in_features=48, out_features=96, tokens=17, after=("Add", "Gelu"))
    x = np.random.default_rng(0).standard_normal((4, 17, 48)).astype(np.float32)
    with graphs.layer(site, rank, 4, "int8") as run:
        assert run(x).shape == (4, 17, 96)
    assert attest(tmp_path / "layer.onnx", "ort-cpu", x, threads=1).shares == {"int8": 1.0}
    with graphs.model(dict.fromkeys(cost.shapes, rank), (), 4, "int8") as run:
        assert run(random_images(4).numpy()).shape == (4, 10)
    assert attest(tmp_path / "model.onnx", "ort-cpu", random_images(4).numpy(), threads=1).products["int8"] > 10
