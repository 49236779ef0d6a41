"""Memory of calibration: the peak of a fresh process that measures the ranges of DeiT-S over images from files."""

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

COUNTS = (64, 1024)
BATCH = 4


def measure_memory(method: str) -> dict[str, Any]:
    """Peak bytes and seconds by the number of images, each in a process of its own."""
    from overhead import write_noise_images
    from quantized.files import random_fp32

    model = random_fp32("deit-s", "dense")
    found = {}
    for count in COUNTS:
        with TemporaryDirectory() as scratch:
            images = Path(scratch) / "images"
            write_noise_images(images, count)
            told = subprocess.run(
                [sys.executable, __file__, model, images, method], check=True, capture_output=True, text=True
            ).stdout
        found[str(count)] = json.loads(told.splitlines()[-1])
    return found


def child(model: Path, images: Path, method: str) -> None:
    """The process that is measured; without torch."""
    from calibrate.ranges import measure_ranges
    from export.images import LabelledImages
    from flora.preprocessing import Preprocessing

    settings = Preprocessing(input_size=(3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
    started = time.monotonic()
    batches = (batch for batch, _ in LabelledImages(str(images), settings).batches(BATCH))
    ranges = measure_ranges(model, batches, method, threads=1)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    print(json.dumps({"images": ranges.images, "seconds": time.monotonic() - started, "peak_bytes": peak}))


if __name__ == "__main__":
    child(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
