"""Whether verification catches what goes wrong with exported models, at its stage, and lets pass what is right.

20 exports of trained models must pass `flora export` and `flora verify`; faults planted one at a time in a chain that
passes must each fail, at the stage where they are, and bisection must name the layer. An arm for each, which resume:

    python benchmarks/verification.py --resume
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from results import arm, exactly, finish, read_arm
from road.dense import DEFAULT_ROOT, prepare
from verified.clean import EXPORTS, RUNS, measure_clean
from verified.planted import IMAGES, Chain, flip, matrices, overflow, permute_classes, scale_step, swapped

NAME = "verification"
DENSE, FP32, FP16, INT8 = (
    "dense, torch",
    "factorized, ONNX Runtime, batch 1",
    "factorized fp16, ONNX Runtime, batch 8",
    "factorized int8, ONNX Runtime, batch 8",
)


def _found(chain: Chain, stage: str | None, where: str = "", **how: Any) -> dict[str, Any]:
    """Which stage failed first, where `stage` should."""
    report = chain.report(**how)
    lines = next((one.failures for one in report.stages if not one.passed), [])
    return {"where": where, "failed": report.first_failure, "said": lines, "caught": report.first_failure == stage}


def _nothing(chain: Chain) -> list[dict[str, Any]]:
    """No stage may fail, and no layer be named."""
    report = _found(chain, None)
    return [{**report, **chain.bisected(precision), "where": None} for precision in ("fp16", "int8")]


def _flipped(chain: Chain) -> list[dict[str, Any]]:
    path = chain.file("fp32")
    found = []
    for name in matrices(path):
        with chain.planted(path, partial(flip, name)):
            found.append(_found(chain, FP32, name))
    return found


def _permuted(chain: Chain) -> list[dict[str, Any]]:
    with chain.planted(chain.file("fp32"), permute_classes):
        return [_found(chain, FP32)]


def _overflowing(chain: Chain) -> list[dict[str, Any]]:
    """In every factorized layer; the FP16 file is written of the FP32 file that it was planted in."""
    found = []
    for layer, products in chain.products().items():
        if len(products) == 2:
            with chain.planted(chain.file("fp32"), partial(overflow, products)):
                chain.write_half()
                found.append(_found(chain, FP16, layer) | chain.bisected("fp16"))
    chain.write_half()
    return found


def _scaled(chain: Chain, *, of_weights: bool) -> list[dict[str, Any]]:
    """In the last product of every layer."""
    found = []
    for layer, products in chain.products().items():
        with chain.planted(chain.file("int8"), partial(scale_step, products[-1], of_weights)):
            found.append(_found(chain, INT8, layer) | chain.bisected("int8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="where Fashion-MNIST is or goes")
    parser.add_argument("--resume", action="store_true", help="keep the arms that are there")
    options = parser.parse_args()
    fashion = f"torch/fashion_mnist,root={prepare(options.root)}"
    RUNS.mkdir(parents=True, exist_ok=True)
    clean = {
        name: arm(NAME, f"clean-{name}", partial(measure_clean, name, fashion), fresh=not options.resume)
        for name in EXPORTS
    }
    planted: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        chain = None
        for fault, plant in PLANTS.items():
            name = f"planted-{fault.replace(' ', '-')}"
            known = read_arm(NAME, name) if options.resume else None
            if known is None:
                chain = chain or Chain(fashion, Path(scratch))
                known = arm(NAME, name, partial(plant, chain), fresh=True)
            planted[fault] = known
    failed = {name: found["failures"] for name, found in clean.items() if found["failures"]}
    bars = [exactly("clean exports that fail", len(failed), 0)]
    for fault, found in planted.items():
        named = [one.get("layer", one["where"]) == one["where"] for one in found]
        missed = sum(not (one["caught"] or ("layer" in one and hit)) for one, hit in zip(found, named, strict=True))
        bars.append(exactly(f"{fault}: neither fails at its stage nor is found by bisection", missed, 0))
        if "layer" in found[0]:
            bars.append(exactly(f"{fault}: bisection names another layer or none", named.count(False), 0))
    finish(
        NAME,
        columns=("", "in", "fails at its stage", "layer named by bisection"),
        rows=[
            ("exports with nothing wrong", str(len(clean)), f"{len(failed)} failed", ""),
            *(_row(fault, found) for fault, found in planted.items()),
        ],
        figures={"clean": clean, "planted": planted},
        bars=bars,
        settings={"model": "Fashion ViT, 40 % of the MACs", "images": IMAGES, "threads": 1},
    )


def _row(fault: str, found: list[dict[str, Any]]) -> tuple[str, str, str, str]:
    caught = sum(one["caught"] for one in found)
    named = str(sum(one["layer"] == one["where"] for one in found)) if "layer" in found[0] else ""
    return fault, f"{len(found)} places", str(caught), named


PLANTS: dict[str, Callable[[Chain], list[dict[str, Any]]]] = {
    "nothing": _nothing,
    "weight tensor flipped": _flipped,
    "mean and std swapped": lambda chain: [_found(chain, DENSE, settings=swapped(chain.settings))],
    "classes of the images permuted": lambda chain: [_found(chain, DENSE, roll=1)],
    "classes of the head permuted": _permuted,
    "FP16 overflow in a layer": _overflowing,
    "INT8 scale of weights times 4": partial(_scaled, of_weights=True),
    "INT8 scale of activations times 4": partial(_scaled, of_weights=False),
}


if __name__ == "__main__":
    main()
