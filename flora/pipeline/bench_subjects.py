"""What a benchmark of a bundle times: artefacts, each on the runtimes that are asked for, and why others are not."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from export.bundle import MODEL_FOLDER, ArtifactEntry, Bundle, Status
from export.runners import Runner
from export.runtimes import TENSORRT, TORCH, TORCH_COMPILED, TORCH_CUDA, TORCH_RUNTIMES, open_runner, runtime_called
from export.tensorrt_runner import TensorRtRunner
from flora.errors import InputError
from flora.pipeline.engine_runs import why_not_run


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One artefact on one runtime; `path` is a file, or the folder of the compact model for torch.

    `asked`, somebody named it, so that it must run.
    """

    name: str
    artifact: str
    runtime: str
    precision: str
    status: Status | None
    is_yardstick: bool
    path: Path
    threads: int
    asked: bool

    @property
    def library(self) -> str:
        """The module that loads the libraries of the runtime."""
        if self.runtime in TORCH_RUNTIMES:
            return "flora.lowrank.checkpoint"
        return {"openvino": "openvino", TENSORRT: "tensorrt"}.get(self.runtime, "onnxruntime")

    @property
    def on_gpu(self) -> bool:
        return runtime_called(self.runtime).on_gpu

    @contextmanager
    def opened(self) -> Iterator[Runner]:
        """A runner of it; `BackendMissingError` where the runtime is not installed or does not work here."""
        with self._runner() as runner:
            yield runner

    def _runner(self) -> Runner:
        if self.runtime == TENSORRT:
            return TensorRtRunner(self.path, name=self.name)
        if self.runtime in TORCH_RUNTIMES:
            return self._torch_runner()
        return open_runner(self.runtime, self.path, threads=self.threads, name=self.name)

    def _torch_runner(self) -> Runner:
        import torch

        from export.torch_runner import TorchRunner
        from flora.lowrank.checkpoint import load_model_folder

        torch.set_num_threads(self.threads)
        model = load_model_folder(self.path)
        return TorchRunner(
            model.module,
            name=self.name,
            device="cpu" if self.runtime in (TORCH, TORCH_COMPILED) else "cuda",
            input_size=model.config.preprocessing.input_size,
            compiled=self.runtime not in (TORCH, TORCH_CUDA),
        )


def subjects_of(
    bundle: Bundle, artifacts: tuple[str, ...], runtimes: tuple[str, ...], threads: int
) -> tuple[list[Subject], dict[str, str]]:
    """What is timed, the one that others are compared with first, and by name why other artefacts are not.

    `artifacts` are names or paths, all where none is given. On `runtimes` each ONNX file is timed besides the runtime
    that it was exported for, and on those of torch the compact model. `InputError` for a name that is none, for a
    runtime that takes neither, and where nothing is left.
    """
    for runtime in runtimes:
        if not runtime_called(runtime).loads_onnx and runtime not in TORCH_RUNTIMES:
            raise InputError(f"{runtime} runs neither ONNX files nor models; its engines are timed without naming it.")
    found: list[Subject] = []
    left_out: dict[str, str] = {}
    for entry in dict.fromkeys(_artifact_names(bundle, artifacts)):
        for subject in _of_entry(bundle, bundle.manifest.artifact(entry), runtimes, threads, asked=bool(artifacts)):
            if reason := _reason_not_to_time(bundle, bundle.manifest.artifact(entry), subject.runtime):
                left_out[subject.name] = reason
            else:
                found.append(subject)
    found += [_in_torch(bundle, runtime, threads) for runtime in dict.fromkeys(runtimes) if runtime in TORCH_RUNTIMES]
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "it holds no artefact"
        raise InputError(f"Nothing of {bundle.folder} can be timed here ({reasons}).")
    # What the export compared with: the last yardstick, in the precision that it would be run in.
    first = next((one for one in reversed(found) if one.is_yardstick), found[0])
    return [first, *(one for one in found if one is not first)], left_out


def _artifact_names(bundle: Bundle, given: tuple[str, ...]) -> list[str]:
    """Names of the artefacts that are given by name or path."""
    entries = bundle.manifest.artifacts
    by_path = {entry.path: entry.name for entry in entries}
    return [by_path.get(name) or bundle.manifest.artifact(name).name for name in given] or [e.name for e in entries]


def _of_entry(
    bundle: Bundle, entry: ArtifactEntry, runtimes: tuple[str, ...], threads: int, *, asked: bool
) -> Iterator[Subject]:
    own = entry.runtime if entry.kind == "onnx" else entry.spec.backend if entry.spec else TORCH
    others = [one for one in runtimes if entry.kind == "onnx" and runtime_called(one).loads_onnx]
    for runtime in dict.fromkeys((own, *others)):
        is_own = runtime == own
        bare = entry.name.removesuffix(f", {runtime_called(own).label}") if entry.kind == "onnx" else entry.name
        yield Subject(
            name=entry.name if is_own else f"{bare}, {runtime_called(runtime).label}",
            artifact=entry.name,
            runtime=runtime,
            precision=entry.precision,
            status=entry.status,
            is_yardstick=is_own and entry.role == "yardstick",
            path=bundle.path_of(entry),
            threads=threads,
            asked=asked or not is_own,
        )


def _reason_not_to_time(bundle: Bundle, entry: ArtifactEntry, runtime: str) -> str | None:
    if entry.kind == "engine":
        if runtime == TENSORRT:
            return why_not_run(entry, bundle.folder, trusted=False)
        return f"nothing here runs engines of {runtime}; they are for an application on the GPU"
    if entry.precision in runtime_called(runtime).only_shown:
        return f"{runtime} shows what engines will compute in {entry.precision}, not how fast"
    if entry.precision not in runtime_called(runtime).files:
        return f"{runtime} runs no files in {entry.precision}"
    return None


def _in_torch(bundle: Bundle, runtime: str, threads: int) -> Subject:
    same = (entry.name for entry in bundle.manifest.artifacts if entry.path == "onnx/model-fp32.onnx")
    what = next(same, MODEL_FOLDER).partition(",")[0]
    return Subject(
        name=f"{what}, {runtime_called(runtime).label}",
        artifact=MODEL_FOLDER,
        runtime=runtime,
        precision="fp32",
        status=None,
        is_yardstick=False,
        path=bundle.folder / MODEL_FOLDER,
        threads=threads,
        asked=True,
    )
