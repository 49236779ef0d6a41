"""Milliseconds: predicted against measured, ranks chosen by latency against ranks chosen by MACs, and the pivoted form.

DeiT-S, DeiT-B and Swin-T at 224 px with random weights, on which time does not depend, on ONNX Runtime and OpenVINO in
FP32, one thread. All is measured in pairs with the dense model, interleaved in one process, and given as ratios. Each
arm keeps its result; with --resume the command goes on. Needs a processor that nothing else runs on.
"""

import argparse
import copy
import random
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
from paper_counts import ranks_of
from results import Bar, arm, at_least, at_most, exactly, finish, read_arm

from export.benchmark import paired_latency
from export.graphs import graph_at_ranks
from export.onnx import onnx_from_module
from export.runners import Runner
from export.runtimes import open_runner
from flora.lowrank.checkpoint import LoadedModel, load_model, load_supernet, save_model
from flora.lowrank.materialize import materialize
from flora.lowrank.pivot import pivot_layers
from flora.lowrank.supernet import build_supernet
from flora.lowrank.targets import PAPER_LAYERS, find_targets, trace_cost
from flora.pipeline.build import build
from flora.pipeline.latency import RANK_MULTIPLE, LatencyRequest, measure_latency
from flora.pipeline.sensitivity import SensitivityRequest, measure_sensitivity
from flora.ranks.allocate import allocate
from flora.ranks.budget import Budget, LatencyBudget, Limit
from flora.ranks.cost import ModelCost, Rank
from flora.ranks.latency import LatencyModel, LatencyTable
from flora.ranks.paper import DEIT_B_8G, DEIT_S_2G7
from flora.ranks.sensitivity import AdditiveModel

NAME = "latency"
ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "latency"
FASHION = ROOT / "examples" / "fashion"
LAYERS = ("qkv", "proj", "fc1", "fc2")
MODELS = {"deit-s": "deit_small_patch16_224", "swin-t": "swin_tiny_patch4_window7_224"}
RUNTIMES = ("ort-cpu", "openvino")
BATCHES = (1, 8)
CONFIGS = 12
REPEATS = {1: 41, 8: 15}
RATIO, ALLOWED_RATIO = 0.6, 0.63
MEDIAN_ERROR, WORST_ERROR = 0.05, 0.12
SHARE_OF_CEILING = 0.95
# The ranks of least loss for their latency that leave half of the MACs, found by halving the interval of latencies.
HALF_BY_LATENCY, HALVINGS = "by latency, half of the MACs", 10
# The released subnets: model, width, ranks, and the MACs that the pivoted form leaves.
RELEASED = {
    "deit-b": ("deit_base_patch16_224", 768, DEIT_B_8G, 7_578_292_224),
    "deit-s": ("deit_small_patch16_224", 384, DEIT_S_2G7, 2_548_518_912),
}
# A choice of ranks, and the layers in pivoted form.
Config = tuple[Mapping[str, Rank], tuple[str, ...]]


def random_model(name: str) -> LoadedModel:
    """A timm model with the random weights of seed 0, from the folder that keeps it."""
    folder = RUNS / name
    if not folder.is_dir():
        torch.manual_seed(0)
        model = load_model(MODELS[name], untrained=True)
        save_model(folder, model.module, model.config)
    return load_model(str(folder))


def cost_of(model: LoadedModel) -> ModelCost:
    return trace_cost(model.module, find_targets(model.module, LAYERS), model.config.preprocessing.input_size)


def measured_ratios(
    name: str, model: LoadedModel, request: LatencyRequest, batch: int, configs: Mapping[str, Config]
) -> dict[str, float]:
    """The latency of each config over that of the dense model in the same repeats."""
    dense = RUNS / f"{name}.onnx"
    if not dense.is_file():
        onnx_from_module(model.module, dense, preprocessing=model.config.preprocessing, max_batch=64)
    graph, cost = onnx.load(dense), cost_of(model)
    with ExitStack() as opened:
        path = Path(opened.enter_context(tempfile.TemporaryDirectory())) / "model.onnx"
        runners: dict[str, Runner] = {}
        for key, (ranks, pivoted) in {"dense": (cost.dense_ranks, ()), **configs}.items():
            graph_at_ranks(graph, cost.shapes, ranks, path, pivoted)
            runners[key] = opened.enter_context(open_runner(request.runtime, path, threads=1))
        stats = paired_latency(runners, _images(batch, model.config.preprocessing.input_size), repeats=REPEATS[batch])
    return {key: one.ratio for key, one in stats.items() if key != "dense"}


def _images(batch: int, size: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, *size)).astype(np.float32)


def random_configs(cost: ModelCost, latency: LatencyModel) -> dict[str, Config]:
    """Configs from low to high ranks, each layer's drawn anew up to the config's level, in its fastest form."""
    configs: dict[str, Config] = {}
    for number in range(CONFIGS):
        draw = random.Random(f"unseen {number}")
        level = (number + 1) / CONFIGS
        ranks = {layer.name: draw.randint(1, max(1, int(level * (layer.full_rank - 1)))) for layer in cost.layers}
        configs[f"{number}"] = (ranks, latency.pivoted(ranks))
    return configs


def measure(name: str, runtime: str, batch: int) -> dict[str, Any]:
    """A table, and models that it has not seen; for DeiT-S at batch 8 also ranks that were chosen by it."""
    model = random_model(name)
    cost = cost_of(model)
    request = LatencyRequest(layers=LAYERS, runtime=runtime, batches=(batch,))
    table = measure_latency(model, RUNS / f"{name}-{runtime}-b{batch}.json", request)
    latency = LatencyModel(table, batch=batch)
    configs = random_configs(cost, latency)
    measured = measured_ratios(name, model, request, batch, configs)
    result: dict[str, Any] = {
        "break_even": {
            str(one.site): {
                "by MACs": cost.shapes[one.layers[0]].break_even_rank,
                "measured": one.break_even_rank,
                "pivoted form fastest": [min(one.fastest_pivoted), max(one.fastest_pivoted)]
                if one.fastest_pivoted
                else None,
            }
            for one in table.sites
        },
        "outside": latency.fixed_ms / latency.dense_ms,
        "unseen": {
            key: {"predicted": latency.ms(ranks) / latency.dense_ms, "measured": measured[key], "pivoted": len(pivoted)}
            for key, (ranks, pivoted) in configs.items()
        },
    }
    if name == "deit-s" and batch == 8:
        result["chosen"] = chosen(name, model, request, latency, table)
    return result


def chosen(
    name: str, model: LoadedModel, request: LatencyRequest, latency: LatencyModel, table: LatencyTable
) -> dict[str, Any]:
    """Ranks for a latency, for MACs around the same latency, and for half of the MACs, measured together."""
    supernet, cost = RUNS / f"{name}-supernet", cost_of(model)
    build(
        random_model(name),
        supernet,
        data=f"{FASHION / 'calibration.tar'},limit=64",
        layers=LAYERS,
        space=f"multiples={RANK_MULTIPLE}",
        keep_redundant=True,
    )
    probes = measure_sensitivity(
        supernet, RUNS / f"{name}-sensitivity", SensitivityRequest(select_data=f"{FASHION / 'selection.tar'},limit=24")
    )
    config = load_supernet(supernet).config
    errors = AdditiveModel({key: layer.spectrum for key, layer in config.layers.items()}, probes.probes)

    def ranks_within(limit: Limit) -> dict[str, Rank]:
        found = allocate(errors.choices(config.space, cost, limit), limit.left_for_layers(cost))
        assert found is not None
        return found

    by_latency = ranks_within(LatencyBudget.parse(f"latency={RATIO}x@b8", table))
    configs: dict[str, Config] = {"latency": (by_latency, latency.pivoted(by_latency))}
    low, high = 0.3, 1.0
    for _ in range(HALVINGS):
        share = (low + high) / 2
        limit = round(share * latency.ns({}))
        ranks = ranks_within(LatencyBudget(limit=limit, text=f"latency={share}x", latency=latency))
        pivoted = latency.pivoted(ranks)
        if cost.macs(ranks, pivoted) <= cost.dense_macs / 2:
            low, configs[HALF_BY_LATENCY] = share, (ranks, pivoted)
        else:
            high = share
    # Half of the MACs, and budgets on both sides of the latency: their losses are interpolated at equal latency.
    for percent in (50, 55, 60, 65, 70):
        configs[f"macs={percent}%"] = (ranks_within(Budget.parse(f"macs={percent}%", cost)), ())
    measured = measured_ratios(name, model, request, 8, configs)
    found = {
        key: {
            "ratio": measured[key],
            "additive_loss": errors.error(ranks),
            "macs": cost.macs(ranks, pivoted) / cost.dense_macs,
            "pivoted": list(pivoted),
            "dense_layers": sum(rank == "dense" for rank in ranks.values()),
        }
        for key, (ranks, pivoted) in configs.items()
    }
    in_layers = sum(layer.macs("dense") for layer in cost.layers) / cost.dense_macs
    outside = latency.fixed_ms / latency.dense_ms
    ceiling = 1 / (outside + (1 - outside) * (in_layers - 0.5) / in_layers)
    return {"configs": found, "ceiling": ceiling}


def measure_pivoted(name: str) -> dict[str, Any]:
    """A released subnet with and without the pivoted form: MACs, logits and latency."""
    timm_name, dim, blocks, _ = RELEASED[name]
    torch.manual_seed(0)
    module = timm.create_model(timm_name).eval()
    size = (3, 224, 224)
    cost = trace_cost(module, find_targets(module, PAPER_LAYERS), size)
    ranks = ranks_of(dim, blocks)
    dense = copy.deepcopy(module)
    build_supernet(module, cost, method="svd")
    layers = [key for key, rank in ranks.items() if rank != "dense"]
    plain = materialize(module, ranks)
    pivoted = materialize(module, ranks, layers)
    left = pivot_layers(pivoted, layers)
    images = torch.randn(4, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = plain(images)
        difference = (pivoted(images) - expected).abs().max() / expected.abs().max()
    preprocessing = load_model(timm_name, untrained=True).config.preprocessing
    files = {key: RUNS / f"{name}-{key}.onnx" for key in ("dense", "two factors", "pivoted")}
    for file, model in zip(files.values(), (dense, plain, pivoted), strict=True):
        onnx_from_module(model, file, preprocessing=preprocessing, max_batch=64)
    ratios = {}
    for runtime in RUNTIMES:
        with ExitStack() as opened:
            runners = {key: opened.enter_context(open_runner(runtime, file, threads=1)) for key, file in files.items()}
            stats = paired_latency(runners, _images(8, size), repeats=REPEATS[8])
        ratios[runtime] = {key: one.ratio for key, one in stats.items() if key != "dense"}
    for file in files.values():
        file.unlink()
    return {
        "macs": cost.macs(ranks),
        "pivoted_macs": trace_cost(pivoted, [], size).dense_macs,
        "kept_two_factors": left,
        "relative_difference": difference.item(),
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="keep what a former run has finished")
    parser.add_argument("--only", action="append", metavar="ARM", help="measure these arms, and judge nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    arms = {
        f"{name}-{runtime}-b{batch}": (measure, name, runtime, batch)
        for name in MODELS
        for runtime in RUNTIMES
        for batch in BATCHES
    } | {f"pivoted-{name}": (measure_pivoted, name) for name in RELEASED}
    for key, (what, *arguments) in arms.items():
        if not options.only or key in options.only:
            arm(NAME, key, lambda what=what, arguments=arguments: what(*arguments), fresh=not options.resume)
            print(f"{key} is measured", flush=True)
    if not options.only:
        judge({key: read_arm(NAME, key) for key in arms})


def judge(results: Mapping[str, Any]) -> None:
    """Rows and bars of all arms."""
    rows: list[list[str]] = []
    bars: list[Bar] = []
    for key, found in results.items():
        if key.startswith("pivoted-"):
            _judge_pivoted(key, found, rows, bars)
        else:
            _judge_predictions(key, found, rows, bars)
        if "chosen" in found:
            _judge_chosen(key, found["chosen"], rows, bars)
    finish(
        NAME,
        columns=["arm", "figure", "value"],
        rows=rows,
        figures=results,
        bars=bars,
        settings={"threads": 1, "configs": CONFIGS, "repeats": str(REPEATS)},
    )


def _judge_predictions(key: str, found: Any, rows: list[list[str]], bars: list[Bar]) -> None:
    off = [abs(one["predicted"] / one["measured"] - 1) for one in found["unseen"].values()]
    median, worst = float(np.median(off)), max(off)
    rows.append([key, "error of the prediction, unseen models", f"median {median:.1%}, worst {worst:.1%}"])
    if "ort-cpu" in key:
        bars.append(at_most(f"{key}: median error of the prediction", median, MEDIAN_ERROR))
        bars.append(at_most(f"{key}: worst error of the prediction", worst, WORST_ERROR))
    forms = [one["pivoted form fastest"] for one in found["break_even"].values()]
    rows.append([key, "pivoted form fastest", f"at some ranks of {sum(map(bool, forms))} of {len(forms)} shapes"])


def _judge_chosen(key: str, found: Any, rows: list[list[str]], bars: list[Bar]) -> None:
    by_latency = found["configs"]["latency"]
    by_macs = [one for name, one in found["configs"].items() if name.startswith("macs")]
    ratios, losses = zip(*sorted((one["ratio"], one["additive_loss"]) for one in by_macs), strict=True)
    loss = by_latency["additive_loss"] / float(np.exp(np.interp(by_latency["ratio"], ratios, np.log(losses))))
    pivoted = f"{len(by_latency['pivoted'])} layers pivoted"
    rows.append([key, f"asked {RATIO}x, measured", f"{by_latency['ratio']:.3f}x, {pivoted}"])
    rows.append([key, "additive loss over that of MACs-chosen ranks at equal latency", f"{loss:.3f}"])
    bars.append(at_most(f"{key}: asked {RATIO}x, measured", by_latency["ratio"], ALLOWED_RATIO))
    bars.append(at_most(f"{key}: additive loss over that of MACs-chosen ranks at equal latency", loss, 1.0))
    what, ceiling = "speed-up at half of the MACs", found["ceiling"]
    speed_up, other = (1 / found["configs"][config]["ratio"] for config in ("macs=50%", HALF_BY_LATENCY))
    rows.append([key, what, f"{speed_up:.2f} by MACs, {other:.2f} by latency, ceiling {ceiling:.2f}"])
    bars.append(at_least(f"{key}: {what} over the ceiling", speed_up / ceiling, SHARE_OF_CEILING))


def _judge_pivoted(key: str, found: Any, rows: list[list[str]], bars: list[Bar]) -> None:
    rows.append([key, "MACs", f"{found['macs'] / 1e9:.3f} G to {found['pivoted_macs'] / 1e9:.3f} G"])
    for runtime, ratios in found["ratios"].items():
        two, pivoted = ratios["two factors"], ratios["pivoted"]
        rows.append([key, f"{runtime}, batch 8, over dense", f"two factors {two:.3f}, all pivoted {pivoted:.3f}"])
    bars.append(exactly(f"{key}: MACs", found["pivoted_macs"], RELEASED[key.removeprefix("pivoted-")][3]))
    bars.append(at_most(f"{key}: difference of logits over the largest", found["relative_difference"], 1e-4))


if __name__ == "__main__":
    main()
