"""What works here: packages, devices, runtimes and engine builders, each tried and not only looked up."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from flora.errors import BackendMissingError, FloraError
from flora.onnxsessions import onnxruntime_module, session_options


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was tried: whether it works, what was found, and what to do if it does not."""

    name: str
    works: bool
    found: str
    advice: str = ""


def diagnose() -> list[Finding]:
    """Try everything that a command of flora may need."""
    return [_try(name, probe, advice) for name, probe, advice in _PROBES] + _onnxruntime_conflict()


def _try(name: str, probe: Callable[[], str], advice: str) -> Finding:
    try:
        return Finding(name=name, works=True, found=probe())
    except (FloraError, ImportError, OSError, RuntimeError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Finding(name=name, works=False, found=lines[0], advice=advice)


def _package(name: str) -> Callable[[], str]:
    def probe() -> str:
        module = importlib.import_module(name)
        return str(module.__version__)

    return probe


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        raise BackendMissingError("torch finds no CUDA GPU")
    return torch.cuda.get_device_name()


def _onnxruntime_provider(provider: str) -> Callable[[], str]:
    def probe() -> str:
        import numpy as np
        from onnx import TensorProto, helper

        node = helper.make_node("Relu", ["x"], ["y"])
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
        graph = helper.make_graph([node], "probe", values[:1], values[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnxruntime, options = onnxruntime_module(), session_options(None)
        if provider not in onnxruntime.get_available_providers():
            raise BackendMissingError(f"onnxruntime {onnxruntime.__version__} was built without {provider}")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
        if provider not in session.get_providers():
            raise BackendMissingError(f"{provider} is listed but did not load")
        session.run(None, {"x": np.zeros(1, np.float32)})
        return f"onnxruntime {onnxruntime.__version__}"

    return probe


def _engine_builder(name: str) -> Callable[[], str]:
    def probe() -> str:
        trt = importlib.import_module(name)
        if not trt.Builder(trt.Logger(trt.Logger.ERROR)):
            raise BackendMissingError("its builder cannot be created here")
        return f"{trt.__version__}, its builder works"

    return probe


def _openvino() -> str:
    openvino = importlib.import_module("openvino")
    return f"{openvino.__version__}, devices {', '.join(openvino.Core().available_devices)}"


_PROBES: tuple[tuple[str, Callable[[], str], str], ...] = (
    ("torch", _package("torch"), "pip install flora-vit"),
    ("timm", _package("timm"), "pip install flora-vit"),
    ("onnx", _package("onnx"), "pip install flora-vit"),
    ("CUDA in torch", _cuda, "only needed for training and evaluation on a GPU"),
    (
        "ONNX Runtime, CPU",
        _onnxruntime_provider("CPUExecutionProvider"),
        "pip install 'flora-vit[cpu]', or flora-vit[gpu] on a GPU; never both",
    ),
    (
        "ONNX Runtime, CUDA",
        _onnxruntime_provider("CUDAExecutionProvider"),
        "on a GPU: pip uninstall onnxruntime, then pip install 'flora-vit[gpu]'",
    ),
    (
        "ONNX Runtime, TensorRT",
        _onnxruntime_provider("TensorrtExecutionProvider"),
        "on a GPU: pip install 'flora-vit[gpu]', with the version of TensorRT that onnxruntime-gpu was built for",
    ),
    ("TensorRT-RTX", _engine_builder("tensorrt_rtx"), "pip install 'flora-vit[rtx]'"),
    (
        "TensorRT",
        _engine_builder("tensorrt"),
        "on a GPU: pip install 'flora-vit[gpu]' with NVIDIA's package index (https://pypi.nvidia.com)",
    ),
    ("OpenVINO", _openvino, "pip install 'flora-vit[openvino]'"),
)


def _onnxruntime_conflict() -> list[Finding]:
    """onnxruntime and onnxruntime-gpu write the same folder: with both, the later one wins silently."""
    both = []
    for distribution in ("onnxruntime", "onnxruntime-gpu"):
        try:
            both.append(f"{distribution} {version(distribution)}")
        except PackageNotFoundError:
            continue
    if len(both) < 2:
        return []
    return [
        Finding(
            name="ONNX Runtime, packages",
            works=False,
            found=" and ".join(both),
            advice="both write the folder onnxruntime: uninstall both, then install the one that you want",
        )
    ]
