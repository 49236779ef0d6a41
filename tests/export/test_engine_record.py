"""An engine is told apart from one that loads here by what its record says, before a library is asked."""

import re
import sys
from pathlib import Path

import pytest

from export.device import Gpu, present_gpu
from export.engine_record import EngineRecord
from export.engine_spec import EngineSpec
from tests.fake_gpu import FakeGpu, fake_tensorrt, install

A10 = Gpu(name="NVIDIA A10", compute_capability="sm86", cuda="13.0", driver="580.65.06")
RTX_3080 = Gpu(name="NVIDIA GeForce RTX 3080", compute_capability="sm86", cuda="13.0", driver="580.65.06")
L4 = Gpu(name="NVIDIA L4", compute_capability="sm89", cuda="13.0", driver="580.65.06")
T4 = Gpu(name="Tesla T4", compute_capability="sm75", cuda="13.0", driver="580.65.06")
H100 = Gpu(name="NVIDIA H100", compute_capability="sm90", cuda="13.0", driver="580.65.06")
FACTS = {"source": "onnx/model-fp32.onnx", "build_seconds": 1.0}


def tensorrt(**options) -> EngineRecord:
    """An engine that TensorRT 11.3 built on an A10."""
    return EngineRecord(
        backend="tensorrt",
        backend_version="11.3.0",
        gpu=A10,
        compute_capabilities=(),
        **{"min_batch": 1, "opt_batch": 8, "max_batch": 64} | FACTS | options,
    )


def rtx(*compute_capabilities: str) -> EngineRecord:
    facts = FACTS | {"min_batch": 1, "opt_batch": 8, "max_batch": 64}
    return EngineRecord(
        backend="tensorrt-rtx", backend_version="1.7.1", compute_capabilities=compute_capabilities, **facts
    )


@pytest.mark.parametrize(
    ("record", "version", "gpu"),
    [
        (tensorrt(), "11.3.0", A10),
        (tensorrt(), "11.3.0", A10.model_copy(update={"driver": "590.1", "cuda": "13.2"})),
        (tensorrt(), "11.3.0", A10.model_copy(update={"driver": None})),
        (tensorrt(version_compatible=True), "11.4.0", A10),
        (tensorrt(hardware_compatible="same-capability"), "11.3.0", RTX_3080),
        (tensorrt(hardware_compatible="ampere-plus"), "11.3.0", L4),
        (tensorrt(hardware_compatible="ampere-plus"), "11.3.0", H100),
        (rtx("sm86", "sm89"), "1.7.1", L4),
    ],
)
def test_an_engine_of_this_device_and_version_is_let_pass(record, version, gpu):
    assert record.why_rebuild(version, gpu) is None


@pytest.mark.parametrize(
    ("record", "version", "gpu", "reason"),
    [
        (tensorrt(), "11.4.0", A10, "it was built by tensorrt 11.3.0 and 11.4.0 is here"),
        (tensorrt(version_compatible=True), "11.2.9", A10, "11.3.0 and 11.2.9 is here"),
        (tensorrt(), "11.3.0", RTX_3080, "built on NVIDIA A10 (sm86) and NVIDIA GeForce RTX 3080 (sm86) is here"),
        (tensorrt(hardware_compatible="same-capability"), "11.3.0", L4, "NVIDIA A10 (sm86) and NVIDIA L4 (sm89)"),
        (tensorrt(hardware_compatible="ampere-plus"), "11.3.0", T4, "NVIDIA A10 (sm86) and Tesla T4 (sm75)"),
        (tensorrt(), "11.3.0", A10.model_copy(update={"cuda": "12.9"}), "CUDA 13.0 and the one here is for CUDA 12.9"),
        (tensorrt(), "11.3.0", A10.model_copy(update={"driver": "575.1"}), "580.65.06 and the older 575.1 is here"),
        (rtx("sm86"), "1.8.0", A10, "it was built by tensorrt-rtx 1.7.1 and 1.8.0 is here"),
        (rtx("sm86", "sm89"), "1.7.1", H100, "it was built for sm86, sm89 and NVIDIA H100 (sm90) is here"),
    ],
)
def test_an_engine_of_elsewhere_is_told_why_it_must_be_built_anew(record, version, gpu, reason):
    assert reason in record.why_rebuild(version, gpu)


def test_a_record_says_what_would_build_the_same_engine_again():
    spec = EngineSpec(
        backend="tensorrt",
        opt_batch=16,
        more_profiles=((1, 1, 1),),
        workspace_mib=512,
        builder_level=4,
        hardware_compatible="same-capability",
        version_compatible=True,
    )
    given = {name: value for name, value in vars(spec).items() if name not in ("backend", "compute_capabilities")}
    record = tensorrt(**given)
    assert record.spec == spec
    assert EngineRecord.model_validate_json(record.model_dump_json()) == record


def test_the_sentence_ends_with_what_to_type(monkeypatch):
    install(monkeypatch, FakeGpu(), fake_tensorrt(lambda plan: None, version="11.4.0"))
    said = tensorrt().why_not_here(Path("my bundle"))
    assert said == (
        "rebuild needed, because it was built by tensorrt 11.3.0 and 11.4.0 is here; "
        "run flora export 'my bundle' --rebuild-engine"
    )


@pytest.mark.parametrize(
    ("capability", "said"),
    [
        ((8, 9), "rebuild needed, because .* run flora export b --rebuild-engine --compute-capabilities sm89"),
        ((9, 0), "NVIDIA A10 .sm90. is here, which tensorrt-rtx knows no kernels for; export it with --to tensorrt"),
    ],
)
def test_an_engine_for_other_gpus_is_to_be_built_for_this_one(monkeypatch, capability, said):
    version = pytest.importorskip("tensorrt_rtx").__version__
    gpu = FakeGpu()
    gpu.capability = capability
    install(monkeypatch, gpu, fake_tensorrt(lambda plan: None))
    record = rtx("sm86").model_copy(update={"backend_version": version})
    assert re.search(said, record.why_not_here(Path("b")))


def test_without_a_gpu_or_the_library_nothing_is_to_be_built(monkeypatch):
    gpu = FakeGpu()
    gpu.is_there = False
    install(monkeypatch, gpu, fake_tensorrt(lambda plan: None))
    assert tensorrt().why_not_here(Path("b")) == "there is no NVIDIA GPU here"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "tensorrt is not installed" in tensorrt().why_not_here(Path("b"))


def test_a_gpu_is_what_cuda_says_of_it(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA A10, 580.65'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpu = FakeGpu()
    install(monkeypatch, gpu, fake_tensorrt(lambda plan: None))
    assert present_gpu() == Gpu(name="NVIDIA A10", compute_capability="sm86", cuda="13.0", driver="580.65")
    gpu.is_there = False
    assert present_gpu() is None
