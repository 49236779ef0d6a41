"""Where an artefact was made: library versions, device and time. Imports none of the libraries that it names."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = (
    "flora-vit",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt_rtx_cu12",
    "tensorrt_rtx_cu13",
)


def versions() -> dict[str, str]:
    """Installed versions of the libraries that can change a result, Python's included."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def device_facts() -> dict[str, str]:
    """The processor that runs this process."""
    return {"cpu": _cpu_name(), "cores": str(os.cpu_count()), "system": f"{platform.system()} {platform.machine()}"}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 (no path of ours)
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def now() -> str:
    """The time in ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
