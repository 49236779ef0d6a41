"""From the results of the arms to the table and the bars of the benchmark `quantization`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from quantized.engines import PRECISIONS
from quantized.files import FORMS, RANDOM_MODELS
from quantized.speed import KINDS, MODELS, RUNTIMES
from results import Bar, at_least, at_most, exactly
from road.arms import right_of
from road.judge import difference

from calibrate.ranges import METHODS

POINTS = 0.3
SHARE_OF_DENSE = 1 / 12
BARRED_MODEL, BARRED_BATCH = "deit-s", "8"
FASTER_THAN_DENSE_INT8 = 1.25
FASTER_THAN_DENSE = {"ort-cpu": 3.0, "openvino": 4.2}
MORE_MEGABYTES = 200
BASELINE = "ort-cpu, dense fp32"

Row = list[str]


def judged(results: Mapping[str, Any]) -> tuple[list[Row], list[Bar]]:
    """Rows and bars of everything whose arms have a result."""
    rows: list[Row] = []
    bars: list[Bar] = []
    for part in (_accuracy, _nncf, _speed, _memory, _engines):
        part(results, rows, bars)
    return rows, bars


def _accuracy(results: Mapping[str, Any], rows: list[Row], bars: list[Bar]) -> None:
    for runtime in RUNTIMES:
        arm = f"fashion-{runtime}"
        if (found := results.get(arm)) is None:
            continue
        dense = found["dense fp32"]
        for what, one in found.items():
            size = f"{one['bytes'] / 1e6:.2f} MB, {dense['bytes'] / one['bytes']:.1f} times smaller"
            beside = "" if one is dense else f"{_change(dense, one)} dense fp32; {size}"
            rows.append([arm, f"{what}, top-1", f"{one['top1']:.2f}", beside])
        for form in FORMS:
            high, low = found[f"{form} fp32"], found[f"{form} int8"]
            rows.append([arm, f"{form}, points by INT8", _change(high, low), f"cosine {low['cosine']:.5f}"])
            for trial, decibels in low["quantization"]["trials"].items():
                rows.append([arm, f"{form}, {trial}", f"{decibels:.1f} dB", ""])
        stacked = found["factorized int8"]
        lost = difference([(right_of(found["factorized fp32"]), right_of(stacked))])[0]
        bars.append(at_most(f"{arm}: points that INT8 costs the factorized model", lost, POINTS))
        share = stacked["bytes"] / dense["bytes"]
        bars.append(at_most(f"{arm}: bytes of factorized INT8 over dense FP32", share, SHARE_OF_DENSE))


def _nncf(results: Mapping[str, Any], rows: list[Row], bars: list[Bar]) -> None:
    if (found := results.get("nncf")) is None:
        return
    high = found["factorized fp32"]
    for quantizer, one in found.items():
        if one is high:
            continue
        beside = f"{_change(high, one)} factorized fp32; {one['bytes'] / 1e6:.2f} MB"
        rows.append(["nncf", f"INT8 by {quantizer}, top-1", f"{one['top1']:.2f}", beside])
        rows.append(["nncf", f"INT8 by {quantizer}, cosine of logits", f"{one['cosine']:.5f}", ""])
        if quantizer != "flora":
            rows.append(["nncf", f"points of flora over {quantizer}", _change(one, found["flora"]), ""])


def _speed(results: Mapping[str, Any], rows: list[Row], bars: list[Bar]) -> None:
    for arm in (f"speed-{name}-{kind}" for name in MODELS for kind in KINDS):
        if (found := results.get(arm)) is None:
            continue
        for batch, times in found["times_ms"].items():
            for what in times:
                ms = f"{np.median(times[what]):.2f} ms"
                rows.append([arm, f"batch {batch}, {what}", ms, f"speed-up {_speed_up(times, BASELINE, what):.2f}"])
            _rows_within_runtime(arm, batch, times, rows)
            if BARRED_MODEL in arm and batch == BARRED_BATCH:
                bars += _speed_bars(arm, times)
        for what, one in found["attestations"].items():
            shares = ", ".join(f"{share:.0%} {precision}" for precision, share in sorted(one["shares"].items()))
            rows.append([arm, f"{what}: time in products", shares, f"{one['conversion_share']:.0%} conversions"])


def _rows_within_runtime(arm: str, batch: str, times: Mapping[str, list[float]], rows: list[Row]) -> None:
    """Factorized INT8 beside the others of its runtime: dense INT8, and NNCF's."""
    for what in times:
        runtime = what.partition(",")[0]
        stacked = f"{runtime}, factorized int8"
        if "int8" in what and what != stacked:
            ratio = f"{_speed_up(times, what, stacked):.2f}"
            rows.append([arm, f"batch {batch}, speed-up of {stacked}", ratio, f"over {what}"])


def _speed_bars(arm: str, times: Mapping[str, list[float]]) -> list[Bar]:
    bars = []
    for runtime in RUNTIMES:
        stacked = f"{runtime}, factorized int8"
        for beside, least in (
            (f"{runtime}, dense int8", FASTER_THAN_DENSE_INT8),
            (BASELINE, FASTER_THAN_DENSE[runtime]),
        ):
            bars.append(at_least(f"{arm}: {stacked}, speed-up over {beside}", _speed_up(times, beside, stacked), least))
    return bars


def _memory(results: Mapping[str, Any], rows: list[Row], bars: list[Bar]) -> None:
    for method in METHODS:
        if (found := results.get(f"memory-{method}")) is None:
            continue
        for count, one in found.items():
            what = f"peak over {count} images"
            rows.append([f"memory-{method}", what, f"{one['peak_bytes'] / 1e6:,.0f} MB", f"{one['seconds']:.0f} s"])
        few, many = (one["peak_bytes"] / 1e6 for one in found.values())
        counts = " less that over ".join(reversed(list(found)))
        bars.append(at_most(f"memory-{method}: MB over {counts} images", many - few, MORE_MEGABYTES))


def _engines(results: Mapping[str, Any], rows: list[Row], bars: list[Bar]) -> None:
    found = {name: result for name in RANDOM_MODELS if (result := results.get(f"engines-{name}"))}
    if not found:
        return
    for name, engines in found.items():
        for precision, one in engines.items():
            text = one.get("error") or f"{one['seconds']:.0f} s, {one['bytes'] / 1e6:.1f} MB"
            beside = "" if "error" in one else ", ".join(one["compute_capabilities"])
            rows.append([f"engines-{name}", precision, text, beside])
    built = sum("error" not in one for engines in found.values() for one in engines.values())
    bars.append(exactly("engines built from Q/DQ graphs", built, len(RANDOM_MODELS) * len(PRECISIONS)))


def _speed_up(times: Mapping[str, list[float]], slower: str, faster: str) -> float:
    """The median of the ratios within repeats."""
    return float(np.median(np.divide(times[slower], times[faster])))


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Points of top-1, with a 95 % interval."""
    drop, low, high = difference([(right_of(before), right_of(after))])
    return f"{-drop:+.2f} ({-high:+.2f} to {-low:+.2f})"
