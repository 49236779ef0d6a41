"""What an export is asked for: targets, precisions, images to prove it with, and what is required of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from export.attestation import Attestation, Requirement, unmet
from export.device import required_gpu
from export.engine_spec import AS_USUAL, NOT_OF_RTX, RTX, BuildOptions, EngineSpec
from export.engines import backend_version
from export.runtimes import ORT_CPU, TENSORRT, check_loads_onnx, precision_of_products, runtime_version
from export.thresholds import thresholds_with
from flora.errors import InputError, few
from flora.lowrank.checkpoint import LoadedModel
from flora.pipeline.engines import BuiltEngine
from flora.pipeline.notes import AskedLatency
from flora.pipeline.precision import Judges, Workbench, open_judges, precisions_asked
from flora.pipeline.proof import Exported, Protocol
from flora.ranks.sensitivity import LayerSensitivity


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export and how to prove it; `batches` are the smallest, usual and largest one.

    With `certifies` the images must be none that the model was made with; without, they are those it was chosen by,
    and their labels count only where they are the model's classes. `runtime` runs the ONNX files, here and in later
    verifications.

    `expect_top1`, in percent, is what the dense model is known to reach on the evaluation images; without `pictures`
    none of these goes into the bundle but the golden ones, which are normalized.

    For `precisions` other than FP32, ranges are measured on `calib_images` of `calib_data`, and every choice is made on
    `select_data`, by default every fourth calibration image. `compare` gives the dense model them as well. `require` is
    what share of the products they must compute in, such as "int8>=80%".

    `build` is how engines are built; what TensorRT times while it builds is kept in the folder `timing_cache`. `probes`
    is what each layer alone was seen to cost, for the manifest.
    """

    eval_data: str | None
    certifies: bool = True
    runtime: str = ORT_CPU
    asked: AskedLatency | None = None
    precisions: tuple[str, ...] = ()
    calib_data: str | None = None
    select_data: str | None = None
    calib_images: int = 128
    seed: int = 0
    compare: bool = False
    require: str | None = None
    targets: tuple[str, ...] = ("onnx",)
    reference: Path | None = None
    max_drop: float | None = None
    thresholds: tuple[str, ...] = ()
    expect_top1: float | None = None
    pictures: bool = True
    opset: int = 20
    batches: tuple[int, int, int] = (1, 8, 64)
    compute_capabilities: tuple[str, ...] = ()
    build: BuildOptions = AS_USUAL
    timing_cache: Path | None = None
    repeats: int = 20
    threads: int | None = None
    command: tuple[str, ...] = ()
    probes: Mapping[str, LayerSensitivity] = field(default_factory=dict)

    def made_with(self, calibration: str, selection: str) -> "ExportRequest":
        """The same with these images for lower precisions, judged by the second where none are given to judge by."""
        request = replace(self, calib_data=calibration, select_data=selection)
        return request if self.eval_data else replace(request, eval_data=selection, certifies=False)

    def engine_specs(self) -> list[EngineSpec]:
        """The engines asked for; what cannot be built or run is refused, `BackendMissingError` without its package."""
        backends = [target for target in self.targets if target != "onnx"]
        if self.compute_capabilities and RTX not in backends:
            raise InputError(f"Compute capabilities are chosen for {RTX} only, which is not among the targets.")
        if self.build != AS_USUAL and not backends:
            raise InputError("Batch profiles and how to build are for engines, and none is among the targets.")
        if self.build.for_tensorrt and TENSORRT not in backends:
            raise InputError(
                f"{few(name.replace('_', ' ') for name in self.build.for_tensorrt)}: for {TENSORRT} only, which is not "
                f"among the targets. {RTX} takes none, since {NOT_OF_RTX[self.build.for_tensorrt[0]]}."
            )
        smallest, usual, largest = self.batches
        specs = [
            EngineSpec(
                backend=backend,
                min_batch=smallest,
                opt_batch=usual,
                max_batch=largest,
                compute_capabilities=(self.compute_capabilities or None) if backend == RTX else None,
                **asdict(self.build.taken_by(backend)),
            )
            for backend in backends
        ]
        for spec in specs:
            backend_version(spec.backend)
            if spec.backend == TENSORRT:  # whose engines are looked into on the GPU that they are built for
                required_gpu(f"An engine of {TENSORRT}")
        check_loads_onnx(self.runtime)
        runtime_version(self.runtime)
        for precision in self.low_precisions:
            for spec in specs:
                spec.fit_for(precision)
        named = set(map(precision_of_products, self.low_precisions))
        if lacking := [precision for precision in self.required if precision not in named]:
            raise InputError(f"{self.require} is required, and the precisions do not name {few(lacking)}.")
        return specs

    @property
    def required(self) -> Mapping[str, float]:
        """The least share of the products by precision."""
        return Requirement.parse(self.require).least if self.require else {}

    @property
    def low_precisions(self) -> tuple[str, ...]:
        """Those besides FP32, in which the model is always exported."""
        has_engines = any(target != "onnx" for target in self.targets)
        return precisions_asked(self.precisions, self.runtime, has_engines=has_engines)[1:]

    @property
    def protocol(self) -> Protocol:
        smallest, usual, _ = self.batches
        return Protocol(
            smallest=smallest,
            usual=usual,
            repeats=self.repeats,
            threads=self.threads,
            thresholds=thresholds_with(self.max_drop, self.thresholds),
            expected_top1=self.expect_top1 if self.certifies else None,
        )

    def judges(self, source: LoadedModel) -> Judges | None:
        """The images that lower precisions are made and chosen with; `InputError` where they are missing."""
        if not self.low_precisions:
            return None
        if self.calib_data is None:
            raise InputError(
                f"{', '.join(self.low_precisions)}: lower precisions are calibrated and chosen on images; name some, "
                "which need no labels and must not be the evaluation images, with --calib-data IMAGES."
            )
        return open_judges(
            self.calib_data,
            self.select_data,
            source.config.preprocessing,
            getattr(source.module, "num_classes", None),
            count=self.calib_images,
            seed=self.seed,
        )

    def workbench(self, judges: Judges, yardstick: Path, scratch: Path, on_step: Callable[[str], None]) -> Workbench:
        """What lower precisions are made with; the dense model's FP32 file lies at `yardstick`."""
        return Workbench(
            judges=judges,
            yardstick=yardstick,
            limits=self.protocol.thresholds,
            runtime=self.runtime,
            threads=self.threads,
            batch=self.batches[1],
            scratch=scratch,
            on_step=on_step,
        )

    def unmet(self, precision: str, attestation: Attestation | None) -> list[str]:
        """What is required of what computes in `precision` and was seen not to be so."""
        return unmet(self.require, precision, attestation)

    def unseen(self, made: Sequence[Exported | BuiltEngine]) -> list[str]:
        """A line for each precision that something is required of, and that nothing here computed in."""
        seen = {one.of_products for one in made if one.attestation is not None}
        return [
            f"{self.require} is required, and nothing computed in {precision} here to see it"
            for precision in self.required
            if precision not in seen
        ]
