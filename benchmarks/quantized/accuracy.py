"""Accuracy in INT8: on each runtime what flora writes for it, and on OpenVINO beside what NNCF writes."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantized.files import FORMS, Fashion
from road.arms import packed

from export.comparison import compare
from export.runtimes import open_runner

BATCH = 250


def measure_fashion(fashion: Fashion, runtime: str) -> dict[str, Any]:
    """Both forms in both precisions on the test images, and how the INT8 files were calibrated."""
    calibrated = {form: fashion.int8(form, runtime) for form in FORMS}
    files = {f"{form} fp32": fashion.fp32(form) for form in FORMS}
    files |= {f"{form} int8": path for form, (path, _) in calibrated.items()}
    found = evaluated(fashion, runtime, files, {f"{form} int8": f"{form} fp32" for form in FORMS})
    for form, (_, record) in calibrated.items():
        found[f"{form} int8"]["quantization"] = record.quantization.model_dump(mode="json")
    return found


def measure_nncf(fashion: Fashion) -> dict[str, Any]:
    """The factorized model quantized by flora and by NNCF from the same images, on OpenVINO with FP32 around INT8."""
    low = {
        "flora": fashion.int8("factorized", "openvino")[0],
        "NNCF": fashion.nncf(),
        "NNCF with overflow_fix": fashion.nncf(overflow_fix=True),
    }
    high = "factorized fp32"
    return evaluated(fashion, "openvino", {high: fashion.fp32("factorized"), **low}, dict.fromkeys(low, high))


def evaluated(
    fashion: Fashion, runtime: str, files: Mapping[str, Path], references: Mapping[str, str]
) -> dict[str, Any]:
    """Which test images each file gets right, its bytes, and how near its logits come to those of its reference."""
    labels, logits = [], {name: [] for name in files}
    with ExitStack() as opened:
        runners = {name: opened.enter_context(open_runner(runtime, path, threads=1)) for name, path in files.items()}
        for images, targets in fashion.test().batches(BATCH):
            labels.append(targets)
            for name, run in runners.items():
                logits[name].append(run(images))
    expected = np.concatenate(labels)
    joined = {name: np.concatenate(parts) for name, parts in logits.items()}
    found = {}
    for name, path in files.items():
        right = torch.from_numpy(joined[name].argmax(1) == expected)
        size = sum(file.stat().st_size for file in (path, path.with_suffix(".bin")) if file.is_file())
        found[name] = packed(right) | {"bytes": size}
        if name in references:
            found[name]["cosine"] = float(compare(joined[references[name]], joined[name]).cosine.mean())
    return found
