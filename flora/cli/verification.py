"""Verification and bundles as tables: used by `flora export` and `flora verify`."""

from pathlib import Path
from typing import TYPE_CHECKING

from export.bundle import REPORT, Bundle, Manifest
from export.engine_spec import named
from export.tally import WorstImage
from export.verify import VerifyReport
from flora.cli.output import millions, percent, print_json, print_next, print_table
from flora.errors import GateFailedError, few

if TYPE_CHECKING:
    from flora.pipeline.family import Family

FP32_BYTES = 4


def print_bundle(bundle: Bundle, wrote: str, command: str, *, as_json: bool) -> None:
    """What was exported and proved, and the next command; `GateFailedError` where a gate failed."""
    manifest, report = bundle.manifest, bundle.manifest.verification
    assert report is not None  # export always verifies
    if as_json:
        print_json(manifest.model_dump(mode="json"))
    else:
        if manifest.selection:
            print_stages(manifest.selection, "Chosen on {} selection images")
        print_stages(report)
        print_artifacts(manifest)
        print_precisions(manifest)
        print_engines(manifest)
        print_verdict(manifest)
        print(f"Report: {bundle.folder / REPORT}")
        print_next(wrote, command)
    if manifest.unmet:
        raise GateFailedError(f"{'; '.join(manifest.unmet)}. The bundle is kept and labelled, see above.")
    if not report.passed:
        raise GateFailedError(f"The gate failed at {report.first_failure}: the bundle is kept and labelled, see above.")


def print_family(family: "Family", bundles: list[Bundle], out: Path, images: str, *, as_json: bool) -> None:
    """What each budget gave, and the next command; `GateFailedError` where a gate failed."""
    if as_json:
        print_json(family.model_dump(mode="json"))
    else:
        print_table(
            [
                "budget",
                "precision",
                "MACs",
                "parameters",
                "size",
                "top-1",
                "agrees with dense",
                "latency ratio",
                "gate",
                "Pareto",
            ],
            [
                [
                    member.budget,
                    member.precision,
                    millions(member.macs),
                    millions(member.params),
                    f"{member.size_bytes / 2**20:.1f} MiB",
                    percent(member.top1),
                    percent(member.agreement),
                    f"{member.latency_ratio:.2f}",
                    "passed" if member.passed else "FAILED",
                    "yes" if member.is_pareto else "no",
                ]
                for member in family.members
            ],
            title="Latency: over the dense model. Pareto: nothing is as accurate and as fast, and better in one",
        )
        for bundle in bundles:
            print(f"{bundle.folder}:")
            print_verdict(bundle.manifest)
            print(f"Report: {bundle.folder / REPORT}")
        compared = f"flora report {' '.join(str(bundle.folder) for bundle in bundles)} -o {out / 'comparison.html'}"
        print_next(
            f"the bundles in {out} (their steps lie in {out}.work)",
            compared,
            *(f"flora verify {bundle.folder} --data {images}" for bundle in bundles),
        )
    failed = [member.budget for member in family.members if not member.passed]
    if failed:
        raise GateFailedError(f"The gate failed for {few(failed)}: the bundles are kept and labelled, see above.")


def print_stages(report: VerifyReport, title: str = "Verification on {} images") -> None:
    """One row a stage: accuracy, and how it compares with the stage that it is held against."""
    rows = [
        [
            stage.name,
            "-" if stage.top1 is None else f"{stage.top1:.2f} % ± {stage.top1_standard_error:.2f}",
            stage.compared_with or "-",
            "-" if stage.drop is None else f"{stage.drop:.2f} ({stage.drop_low:.2f} to {stage.drop_high:.2f})",
            "-" if stage.p_value is None else f"{stage.p_value:.2g}",
            "-" if stage.agreement is None else f"{stage.agreement:.2%}",
            "-" if stage.cosine is None else f"{stage.cosine:.6f}",
            "-" if stage.max_abs is None else f"{stage.max_abs:.1e}",
            "-" if stage.kl is None else f"{stage.kl:.1e}",
            "passed" if stage.passed else "FAILED",
        ]
        for stage in report.stages
    ]
    print_table(
        ["stage", "top-1", "compared with", "drop (95 %)", "p", "agreement", "cosine", "max abs", "KL", "gate"],
        rows,
        title=title.format(report.stages[0].images),
    )
    for stage in report.stages:
        for line in (*stage.failures, *stage.notes):
            print(f"{stage.name}: {line}")
        if not stage.passed and stage.worst:
            print(f"{stage.name}: furthest off on {'; '.join(map(_described, stage.worst))}")


def _described(image: WorstImage) -> str:
    label = "" if image.label is None else f", labelled {image.label}"
    return f"{image.name} (class {image.predicted}, before {image.expected}{label}, {image.kl:.2g} nats)"


def print_artifacts(manifest: Manifest) -> None:
    """One row for each thing that was measured or built: cost, size, accuracy, agreement and latency.

    The size of what is no file of the bundle is that of its weights in single precision.
    """
    stages = {stage.name: stage for stage in manifest.verification.stages} if manifest.verification else {}
    artifacts = {entry.name: entry for entry in manifest.artifacts}
    first = next(iter(manifest.latency.values()))
    rows = []
    for name in [*manifest.latency, *(name for name in artifacts if name not in manifest.latency)]:
        entry = artifacts.get(name) or next(
            artifacts[key] for key in artifacts if key.startswith(name.removesuffix("torch"))
        )
        stage = stages.get(name) or next((stages[key] for key in stages if key.startswith(f"{name},")), None)
        latency = manifest.latency.get(name)
        rows.append(
            [
                name,
                millions(entry.macs),
                millions(entry.params),
                f"{(entry.size_bytes if name in artifacts else FP32_BYTES * (entry.params or 0)) / 2**20:.1f} MiB",
                "-" if stage is None or stage.top1 is None else f"{stage.top1:.2f} % ± {stage.top1_standard_error:.2f}",
                "-" if stage is None or stage.agreement is None else f"{stage.agreement:.2%} {stage.compared_with}",
                "-" if latency is None else f"{latency.ratio:.2f}",
                entry.status if name in artifacts else "in torch",
            ]
        )
    print_table(
        ["", "MACs", "parameters", "size", "top-1", "agrees with", "latency ratio", "status"],
        rows,
        title=f"Latency: over the first row, batch {first.batch_size}, median of {first.repeats} paired runs",
    )


def print_precisions(manifest: Manifest) -> None:
    """How each file of lower precision came to be, and what it was seen to compute in."""
    rows = []
    for entry in manifest.artifacts:
        made, seen = entry.quantization, entry.attestation
        if (entry.kind == "onnx" and entry.precision != "fp32") or (entry.kind == "engine" and seen):
            best = made.name if made else "casts"
            trial = made.trials.get(best) if made else None
            rows.append(
                [
                    entry.name,
                    best,
                    str(made.images) if made else "-",
                    "-" if trial is None else f"{trial:.1f} dB",
                    str(len(made.high)) if made else "-",
                    "-" if seen is None else ", ".join(f"{name} {share:.0%}" for name, share in seen.shares.items()),
                    "-" if seen is None else f"{seen.conversion_share:.0%}",
                    "-"
                    if seen is None or seen.fused_attention is None
                    else f"{seen.fused_attention} of {seen.attention_blocks}",
                ]
            )
    if rows:
        print_table(
            [
                "",
                "calibrated by",
                "images",
                "signal to noise",
                "layers kept high",
                "products computed in",
                "conversions",
                "attention in one kernel",
            ],
            rows,
            title="Lower precisions: how they were made, and what really computes",
        )
    for entry in manifest.artifacts:
        if entry.status == "failed" and entry.precision != "fp32":
            print(f"{entry.name} is not to be shipped: {entry.reason}")


def print_engines(manifest: Manifest) -> None:
    """One row for each engine: what it was built for and by, and how long that took."""
    rows = []
    for entry in manifest.artifacts:
        if (spec := entry.spec) is not None:
            rows.append(
                [
                    entry.name,
                    ", ".join(spec.compute_capabilities) or (spec.gpu.name if spec.gpu else "-"),
                    named(spec.profiles),
                    spec.backend_version,
                    f"{entry.size_bytes / 2**20:.1f} MiB",
                    f"{spec.build_seconds:.0f} s",
                    entry.status,
                ]
            )
    if rows:
        columns = ["", "built for", "batches (min/opt/max)", "version", "size", "built in", "status"]
        print_table(columns, rows, title="Engines")


def print_verdict(manifest: Manifest) -> None:
    """What to ship and why, and what the user should know."""
    if manifest.recommended:
        path = manifest.artifact(manifest.recommended).path
        print(f"Recommended: {path} ({manifest.recommended}): {manifest.recommendation_reason}.")
    else:
        print(f"Nothing is recommended: {manifest.recommendation_reason}.")
    for note in manifest.notes:
        print(f"Note: {note}")
