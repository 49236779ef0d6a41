"""Every name of TensorRT that our sources use is one that TensorRT 10.13, 11.4 and TensorRT-RTX have, and keep.

The two wheels come from PyPI and are read, never installed: without NVIDIA's libraries `import tensorrt` would find
them and fail halfway.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from tensorrt_names import MODULE, Published, Reader, Use, is_in, published_by_bindings, published_by_stubs

from export.engine_spec import COMPUTE_CAPABILITIES, HARDWARE_LEVELS

ROOT = Path(__file__).parent.parent.parent
STUBS, BINDINGS = "tensorrt-stubs==10.13.0.35.1", "tensorrt-cu13-bindings==11.4.0.106"
# What only TensorRT-RTX has.
RTX_ONLY = {
    Use(MODULE, "ComputeCapability"),
    Use("IBuilderConfig", "num_compute_capabilities"),
    Use("IBuilderConfig", "set_compute_capability"),
}
# Removed in TensorRT 11.
REMOVED = {
    "EXPLICIT_BATCH": "trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
    "FP16": "trt.BuilderFlag.FP16",
    "INT8": "trt.BuilderFlag.INT8",
    "FP8": "trt.BuilderFlag.FP8",
    "BF16": "trt.BuilderFlag.BF16",
    "OBEY_PRECISION_CONSTRAINTS": "trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS",
    "IInt8EntropyCalibrator2": "trt.IInt8EntropyCalibrator2()",
    "int8_calibrator": "trt.Builder(None).create_builder_config().int8_calibrator",
    "set_calibration_profile": "trt.Builder(None).create_builder_config().set_calibration_profile",
    "execute_async_v2": "trt.Runtime(None).deserialize_cuda_engine(b'').create_execution_context().execute_async_v2",
}


@pytest.fixture(scope="module")
def wheels(pytestconfig) -> dict[str, Path]:
    """The wheels, downloaded once into pytest's cache."""
    folder = pytestconfig.cache.mkdir("tensorrt-wheels")
    platform = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--only-binary", ":all:")
    found = {}
    for requirement in (STUBS, BINDINGS):
        name, _, version = requirement.partition("==")
        pattern = f"{name.replace('-', '_')}-{version}-*.whl"
        if not list(folder.glob(pattern)):
            command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder))
            subprocess.run([*command, *platform, requirement], check=True, timeout=300)
        (found[requirement],) = folder.glob(pattern)
    return found


@pytest.fixture(scope="module")
def stubs(wheels) -> Published:
    return published_by_stubs(wheels[STUBS])


@pytest.fixture(scope="module")
def bindings(wheels) -> bytes:
    return published_by_bindings(wheels[BINDINGS])


@pytest.fixture(scope="module")
def ours(stubs) -> set[Use]:
    files = [path for package in ("flora", "export", "calibrate") for path in (ROOT / package).rglob("*.py")]
    sources = {str(path): path.read_text() for path in files}
    return Reader({file: text for file, text in sources.items() if "tensorrt" in text.lower()}, stubs.types).uses


def lacking(uses: set[Use], stubs: Published, bindings: bytes) -> set[Use]:
    """What the stubs do not have or say is to go, and what the bindings do not have."""
    return {
        use
        for use in uses
        if use.name not in stubs.types[use.owner] or use in stubs.deprecated or not is_in(bindings, use.name)
    }


def test_the_names_that_our_sources_use_are_found(ours):
    assert ours >= {
        Use(MODULE, "Builder"),
        Use("ILogger.Severity", "ERROR"),
        Use("Builder", "build_serialized_network"),
        Use("BuilderFlag", "TF32"),
        Use("IBuilderConfig", "add_optimization_profile"),
        Use("IBuilderConfig", "builder_optimization_level"),
        Use("ITimingCache", "serialize"),
        Use("IOptimizationProfile", "set_shape"),
        Use("INetworkDefinition", "get_input"),
        Use("ITensor", "shape"),
        Use("ParserError", "node_operator"),
        Use("IExecutionContext", "execute_async_v3"),
        Use("EngineInspector", "get_engine_information"),
        Use("LayerInformationFormat", "JSON"),
    }


def test_tensorrt_10_and_11_have_every_name_that_our_sources_use(ours, stubs, bindings):
    assert lacking(ours, stubs, bindings) - RTX_ONLY == set()
    assert ours >= RTX_ONLY
    assert lacking(RTX_ONLY, stubs, bindings) == RTX_ONLY
    levels = {Use("HardwareCompatibilityLevel", name) for name in HARDWARE_LEVELS.values()}
    assert lacking(levels, stubs, bindings) == set()


def test_tensorrt_rtx_has_every_name_that_our_sources_use(ours):
    rtx = pytest.importorskip("tensorrt_rtx")
    for use in ours:
        owner = rtx
        for part in use.owner.split(".") if use.owner != MODULE else ():
            owner = getattr(owner, part)
        assert hasattr(owner, use.name), use
    assert {name.upper() for name in COMPUTE_CAPABILITIES["tensorrt-rtx"]} <= set(rtx.ComputeCapability.__members__)


@pytest.mark.parametrize("name", REMOVED)
def test_a_name_that_was_removed_is_caught(stubs, bindings, name):
    uses = Reader({"new.py": f"def build(trt):\n    found = {REMOVED[name]}\n"}, stubs.types).uses
    assert name in {use.name for use in lacking(uses, stubs, bindings)}


def test_a_name_is_followed_through_functions_and_attributes(stubs, bindings):
    source = """
class Runner:
    def __init__(self, path):
        trt = backend_module("tensorrt")
        self._runtime = trt.Runtime(None)
        self._engine = opened(self._runtime, path)

    def misspelt(self):
        return self._engine.get_tensor_names(0)

def opened(runtime, path):
    return runtime.deserialize_cuda_engine(path.read_bytes())
"""
    found = lacking(Reader({"runner.py": source}, stubs.types).uses, stubs, bindings)
    assert found == {Use("ICudaEngine", "get_tensor_names")}
