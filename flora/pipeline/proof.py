"""Proving the files of a bundle: the chain of stages, latency, and what may be recommended."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from export.attestation import Attestation
from export.benchmark import LatencyStats, paired_latency
from export.bundle import ArtifactEntry, PartCost, QuantizationRecord, Status, fp32_path, size_of, write_golden
from export.images import ImageSet
from export.runners import Runner
from export.runtimes import open_runner, precision_of_products, runtime_called
from export.thresholds import Thresholds
from export.torch_runner import TorchRunner
from export.verify import Stage, StageReport, VerifyReport, verify
from flora.lowrank.checkpoint import LoadedModel
from flora.lowrank.targets import trace_cost

GOLDEN_IMAGES = 8
TORCH_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Exported:
    """One ONNX file of the bundle, the model that it holds, and the names of its stages and rows.

    `fp32_name` is that of the same model's file in FP32, which one of lower precision is compared with.
    """

    name: str
    runtime: str
    role: str
    model: LoadedModel
    path: str
    module: nn.Module
    precision: str = "fp32"
    fp32_name: str = ""
    quantization: QuantizationRecord | None = None
    attestation: Attestation | None = None

    @property
    def torch_name(self) -> str:
        return f"{self.name}, torch"

    @property
    def called(self) -> str:
        return self.name if self.precision == "fp32" else f"{self.name} {self.precision}"

    @property
    def onnx_name(self) -> str:
        return f"{self.called}, {runtime_called(self.runtime).label}"

    @property
    def fp32_path(self) -> str:
        """Where the same model's file in FP32 lies."""
        return fp32_path(self.path, self.precision)

    @property
    def of_products(self) -> str:
        """The precision that products should be computed in."""
        return precision_of_products(self.precision)

    @property
    def is_for_engines(self) -> bool:
        """Whether the file shows here what engines will compute, not how fast."""
        return self.precision in runtime_called(self.runtime).only_shown

    @property
    def runs_here(self) -> bool:
        """Whether the runtime takes a file of this precision."""
        return self.precision in runtime_called(self.runtime).files


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How files are run: at the smallest and the usual batch; at the usual one their time is taken so often.

    `expected_top1` in percent is what the first model is known to reach.
    """

    smallest: int
    usual: int
    repeats: int
    threads: int | None
    thresholds: dict[str, Thresholds]
    expected_top1: float | None = None


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What came out on one set of images."""

    report: VerifyReport
    latency: dict[str, LatencyStats]
    stages_of: dict[str, list[str]]

    def failures(self, one: Exported) -> list[str]:
        """A line for each stage of the file that failed."""
        return [
            f"{stage.name}: {', '.join(stage.failures)}"
            for stage in self.report.stages
            if stage.name in self.stages_of[one.onnx_name] and not stage.passed
        ]


def prove(
    exported: Sequence[Exported],
    folder: Path,
    images: ImageSet,
    protocol: Protocol,
    *,
    in_torch: bool = True,
    timed: Sequence[Exported] = (),
    golden: Path | None = None,
    on_step: Callable[[str], None],
) -> Proof:
    """Run every file on all images and measure latency; golden images and logits go to the file `golden`.

    The chain: dense in torch, dense on the runtime; factorized in torch against dense, on the runtime at two batches; a
    lower precision against the same model in FP32, and against dense. Not `in_torch`, files alone are run. Files
    that are only `timed` give golden logits. Latency is compared with the last yardstick's, else with the first file's;
    of files for engines it says nothing, and is left out.
    """
    first_images = next(iter(images.batches(GOLDEN_IMAGES)))[0]
    stages: list[Stage] = []
    runners: dict[str, Runner] = {}
    golden_logits: dict[str, np.ndarray] = {}
    stages_of: dict[str, list[str]] = {}
    with ExitStack() as opened:
        for one in exported:
            onnx_runner = opened.enter_context(_open(one, folder, protocol))
            runners[one.onnx_name] = onnx_runner
            torch_runner = None
            if one.precision == "fp32" and in_torch:
                size = one.model.config.preprocessing.input_size
                torch_runner = opened.enter_context(TorchRunner(one.model.module, name=one.torch_name, input_size=size))
                runners[one.torch_name] = torch_runner
            golden_logits[one.path] = (torch_runner or onnx_runner)(first_images)
            first = stages[0].name if stages else None
            if one.precision == "fp32":
                chain = _fp32_stages(one, torch_runner, onnx_runner, first, protocol)
            else:
                chain = _low_stages(one, onnx_runner, first, protocol)
            stages += chain
            stages_of[one.onnx_name] = [stage.name for stage in chain]
        for one in timed:
            runners[one.onnx_name] = opened.enter_context(_open(one, folder, protocol))
            golden_logits[one.path] = runners[one.onnx_name](first_images)
        stages[0] = replace(stages[0], expected_top1=protocol.expected_top1)
        report = verify(
            stages,
            images,
            thresholds=protocol.thresholds,
            progress=lambda done, total: on_step(f"verifying every step: {done} of {total} images"),
        )
        on_step("measuring latency")
        if golden is not None:
            write_golden(golden, first_images, golden_logits)
        # What is compared with: the yardstick, in the precision that it would be run in.
        yardsticks = [one.onnx_name for one in (*exported, *timed) if one.role == "yardstick"]
        for_engines = {one.onnx_name for one in exported if one.is_for_engines}
        runners = {name: runners[name] for name in (*yardsticks[-1:], *runners) if name not in for_engines}
        batch = np.resize(first_images, (protocol.usual, *first_images.shape[1:]))
        latency = paired_latency(runners, batch, repeats=protocol.repeats)
        return Proof(report=report, latency=latency, stages_of=stages_of)


def _open(one: Exported, folder: Path, protocol: Protocol) -> Runner:
    return open_runner(
        one.runtime,
        folder / one.path,
        name=one.onnx_name,
        threads=protocol.threads,
        as_written=one.is_for_engines,
    )


def _fp32_stages(
    one: Exported, torch_runner: Runner | None, onnx_runner: Runner, first: str | None, protocol: Protocol
) -> list[Stage]:
    batches = dict.fromkeys((protocol.usual,) if one.role == "yardstick" else (protocol.smallest, protocol.usual))
    steps = [(_at_batch(one.onnx_name, batch), onnx_runner, batch) for batch in batches]
    if torch_runner is not None:
        steps.insert(0, (one.torch_name, torch_runner, TORCH_BATCH))
    stages: list[Stage] = []
    for name, runner, batch in steps:
        kind, before = ("fp32", stages[-1].name) if stages else ("lowrank", first)
        stages.append(Stage(name=name, runner=runner, batch_size=batch, kind=kind, compared_with=before))
    return stages


def _low_stages(one: Exported, runner: Runner, first: str | None, protocol: Protocol) -> list[Stage]:
    return [
        Stage(
            name=_at_batch(one.onnx_name, protocol.usual),
            runner=runner,
            batch_size=protocol.usual,
            kind=one.precision,
            compared_with=_at_batch(one.fp32_name, protocol.usual),
        ),
        Stage(
            name=f"{_at_batch(one.onnx_name, protocol.smallest)}, against the first",
            runner=runner,
            batch_size=protocol.smallest,
            kind="lowrank",
            compared_with=first,
        ),
    ]


def _at_batch(name: str, batch: int) -> str:
    return f"{name}, batch {batch}"


def onnx_entry(
    one: Exported,
    folder: Path,
    files: dict[str, str],
    status: Status,
    reason: str | None,
    *,
    parts: Mapping[str, PartCost],
    certified: bool = True,
) -> ArtifactEntry:
    """What the manifest keeps of one ONNX file."""
    cost = trace_cost(one.module, [], one.model.config.preprocessing.input_size)
    return ArtifactEntry(
        name=one.onnx_name,
        path=one.path,
        kind="onnx",
        runtime=one.runtime,
        precision=one.precision,
        role=one.role,
        status=status,
        reason=reason,
        certified=certified,
        sha256=files[one.path],
        size_bytes=size_of(folder / one.path),
        macs=cost.dense_macs,
        params=cost.dense_params,
        parts=dict(parts),
        quantization=one.quantization,
        attestation=one.attestation,
    )


def recommend(
    entries: Sequence[ArtifactEntry], latency: Mapping[str, LatencyStats], start: StageReport, *, factorized: bool
) -> tuple[str | None, str]:
    """The fastest of the verified `entries`, and why; the yardstick when nothing beats it.

    Nothing where the `start` of the chain, which all are compared with, fails by itself.
    """
    if not start.passed:
        return None, f"{start.name}, which all is compared with, fails by itself"
    verified = [entry for entry in entries if entry.status == "verified"]
    if not verified:
        return None, "nothing passed its gate"
    if factorized and not any(entry.role == "yardstick" for entry in entries):
        return None, "without the dense model nothing is known of what low rank costs; name it with --reference"
    if len(verified) == len(entries) == 1:
        return verified[0].name, "it passed every gate"
    best = min(verified, key=lambda entry: latency[entry.name].ratio)
    if best.role == "yardstick":
        return best.name, "all others are slower here or failed their gates: ship the dense one"
    return best.name, f"it passed every gate and takes {_share(latency[best.name])} of the dense model's time"


def _share(latency: LatencyStats) -> str:
    """The ratio, with its interval where that holds 1."""
    low, high = latency.ratio_interval or (0.0, 0.0)
    return f"{latency.ratio:.2f} ({low:.2f} to {high:.2f}, so perhaps all)" if high >= 1 else f"{latency.ratio:.2f}"
