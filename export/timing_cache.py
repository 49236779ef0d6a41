"""What TensorRT has timed on this GPU, kept for the next build: one file for each place where the times hold.

TensorRT times every kernel that it could use, which is most of a build. Times are those of one GPU, driver and version
of TensorRT; the name of the file says which, so a cache of elsewhere is never read.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from export.device import required_gpu
from flora.artifact import new_file


@dataclass(frozen=True)
class TimingCache:
    """The cache in a file, which need not be there yet."""

    file: Path

    @classmethod
    def of(cls, folder: Path, builder: str) -> Self:
        """The one in `folder` for this GPU and driver, and the `builder`, which is a backend and its version."""
        gpu = required_gpu(f"An engine of {builder}")
        facts = (builder, gpu.name, gpu.compute_capability, f"CUDA {gpu.cuda}", f"driver {gpu.driver}")
        digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]
        readable = re.sub(r"[^\w.]+", "-", " ".join(facts[:3]))
        return cls(Path(folder) / f"{readable}-{digest}.timing")

    def attach(self, config: Any) -> None:
        """Give the builder's `config` what is known; nothing, where TensorRT says that it holds for another GPU."""
        known = self.file.read_bytes() if self.file.is_file() else b""
        for content in (known, b""):
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, False):
                return

    def keep(self, config: Any) -> None:
        """Write what `config` knows after a build."""
        cache = config.get_timing_cache()
        if cache is not None:
            with new_file(self.file) as partial:
                partial.write_bytes(cache.serialize())
