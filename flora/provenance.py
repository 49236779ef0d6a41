"""Where an artefact was made: library versions, device and time. Imports none of the libraries that it names."""

import os
import platform
import shutil
import subprocess
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


# Instructions that decide how fast products are.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


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
    """The processor that runs this process; its name alone does not tell generations apart in a virtual machine."""
    facts = _cpu_facts()
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name") or platform.processor() or "unknown",
        "instructions": ", ".join(name for name in INSTRUCTIONS if name in flags) or "unknown",
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
    }


def gpu_facts() -> dict[str, str]:
    """The first NVIDIA GPU and its driver, as its tool names them; nothing where there is none."""
    return dict(zip(("gpu", "driver"), _asked_of_gpu("name,driver_version"), strict=False))


def clocks() -> dict[str, str]:
    """The processor's clock now, and those of the GPU, where the system says so."""
    mhz = _cpu_facts().get("cpu MHz")
    gpu = zip(("gpu MHz", "gpu memory MHz"), _asked_of_gpu("clocks.sm,clocks.mem"), strict=False)
    return ({"cpu MHz": mhz} if mhz else {}) | dict(gpu)


def _asked_of_gpu(fields: str) -> list[str]:
    """What nvidia-smi says of the first GPU that this process sees, in the order of `fields`."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    query = [tool, *(["-i", visible] if visible else []), f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return []
    first = answer.stdout.partition("\n")[0] if answer.returncode == 0 else ""
    return [part.strip() for part in first.split(",") if part.strip()]


def _cpu_facts() -> dict[str, str]:
    """What Linux says of the first processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 (no path of ours)
            lines = file.read().split("\n\n", 1)[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def now() -> str:
    """The time in ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
