"""`report.html`: what a bundle is, on one page that needs nothing else: what to ship, why, and the proof.

A function of the bundle's folder alone. Every figure is one of the manifest, and the page says which: the elements that
hold figures carry their path in it. Needs no torch.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from plotly.offline import get_plotlyjs

from export.bundle import REPORT, Bundle, Manifest, check_hashes, load_bundle
from export.parts import in_order
from export.report.facts import (
    ArtifactRow,
    artifact_rows,
    label_of,
    layer_grid,
    limits_of,
    lowrank_stage,
    yardstick_of,
)
from export.report.figures import latency_plot, parts_plot, time_in_dense
from export.report.format import FORMS, Figures
from export.report.points import COSTS, is_labelled, points_of
from export.report.scatter import accuracy_against
from flora.artifact import new_file, sha256_of_file
from flora.errors import InputError, few

SMALL_PIXELS = 96


def sound_bundle(folder: Path) -> Bundle:
    """The bundle in `folder`; `InputError` where it is none, or where its files are not those that were exported."""
    bundle = load_bundle(folder)
    if problems := check_hashes(bundle):
        raise InputError(
            f"{folder} is not what was exported ({few(problems, 3)}), so its manifest says nothing of it. "
            "Export it again, or copy it anew."
        )
    return bundle


def add_report(manifest: Manifest, folder: Path) -> Manifest:
    """Write the report of a bundle that lies in `folder` but for its manifest; the manifest with the report's hash."""
    with new_file(folder / REPORT) as partial:
        partial.write_text(report_page(Bundle(folder=folder, manifest=manifest)), encoding="utf-8")
    return manifest.model_copy(update={"files": manifest.files | {REPORT: sha256_of_file(folder / REPORT)}})


def report_page(bundle: Bundle) -> str:
    """The page of one bundle, the same whether the report is part of it already or not."""
    manifest = bundle.manifest
    rows = artifact_rows(manifest)
    shipped = manifest.artifact(manifest.recommended) if manifest.recommended else None
    return page(
        "report.html.jinja",
        title=f"{manifest.model}: {verdict(manifest)}",
        manifest=manifest,
        show=Figures(manifest.model_dump(mode="json")),
        verdict=verdict(manifest),
        shipped=shipped,
        yardstick=yardstick_of(manifest),
        lowrank=lowrank_stage(manifest, shipped.name) if shipped else None,
        rows=rows,
        row_of={row.entry.name: row for row in rows},
        label_of=label_of,
        limits_of=limits_of,
        forms=FORMS,
        grid=layer_grid(manifest.layers),
        with_parts=[row for row in rows if row.entry.parts],
        part_names=in_order({part for row in rows for part in row.entry.parts}),
        low=[
            row for row in rows if row.entry.precision != "fp32" and (row.entry.kind == "onnx" or row.entry.attestation)
        ],
        engines=[row for row in rows if row.entry.spec is not None],
        measured=any(layer.sensitivity is not None for layer in manifest.layers),
        worst=manifest.verification is not None and any(stage.worst for stage in manifest.verification.stages),
        class_called=lambda index: _class_called(manifest, index),
        plots=_plots(manifest, rows),
        pictures=_pictures(bundle),
        files={name: digest for name, digest in manifest.files.items() if name != REPORT},
    )


def page(template: str, **facts: Any) -> str:
    """A page from one of the templates, with plotly.js in it."""
    environment = Environment(
        loader=PackageLoader("export.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**facts, plotlyjs=get_plotlyjs())


def verdict(manifest: Manifest) -> str:
    """What to ship, in few words."""
    if manifest.recommended is None:
        return "Nothing to ship"
    entry = manifest.artifact(manifest.recommended)
    return f"Ship the {label_of(entry)} model" if entry.kind == "onnx" else f"Ship the engine {label_of(entry)}"


def _plots(manifest: Manifest, rows: Sequence[ArtifactRow]) -> dict[str, dict[str, Any]]:
    """Every plot by the name of its element."""
    accuracy = "top-1, %" if is_labelled(manifest) else "agreement with the dense model, %"
    plots = {}
    for cost, words in COSTS.items():
        if points := points_of(manifest, rows, cost):
            plots[f"accuracy-{cost}"] = accuracy_against(points, cost=words, accuracy=accuracy)
    if manifest.latency:
        plots["latency"] = latency_plot(manifest.latency)
    inside = {row.label: row.entry for row in rows if row.entry.parts}
    if inside:
        macs = {
            label: {part: float(cost.macs) for part, cost in entry.parts.items()} for label, entry in inside.items()
        }
        plots["macs"] = parts_plot(macs, axis="MACs of one image", percent=False)
    times = {
        label: shares
        for label, entry in inside.items()
        if entry.name in manifest.latency and (shares := time_in_dense(entry.parts, manifest.latency[entry.name].ratio))
    }
    if times:
        plots["time"] = parts_plot(times, axis="share of the dense model's time", percent=True, unit="%{x:.1%}")
    return plots


def _class_called(manifest: Manifest, index: int) -> str:
    names = manifest.class_names or []
    return names[index] if index < len(names) else f"class {index}"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image as data of the page; a small one is shown pixel by pixel."""

    source: str
    is_small: bool


def _pictures(bundle: Bundle) -> dict[str, Picture]:
    """The worst images by their file."""
    report = bundle.manifest.verification
    named = {image.file for stage in report.stages for image in stage.worst} if report else set()
    pictures = {}
    for name in sorted(bundle.manifest.files.keys() & named):
        content = (bundle.folder / name).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            is_small = image.width < SMALL_PIXELS
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        pictures[name] = Picture(source=source, is_small=is_small)
    return pictures
