"""What a benchmark of a bundle found: one row for each artefact, runtime and batch, as JSON and as CSV."""

import csv
import io
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from export.benchmark import LatencyStats
from export.bundle import Status
from export.latency import MOST_SPREAD
from export.memory import PeakMemory
from flora.artifact import Document, new_file
from flora.errors import InputError


class BenchRow(BaseModel):
    """One artefact on one runtime at one batch; `status` is the manifest's, and None for what is no artefact of it.

    `provider` is what really ran. With `transfers`, images come from the memory of the processor and logits go back to
    it; without, they lie on the GPU; None on a processor. `warm_up` repeats were left out before the times were
    `steady`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    artifact: str
    runtime: str
    provider: str
    precision: str
    status: Status | None
    transfers: bool | None
    latency: LatencyStats
    warm_up: int
    memory: PeakMemory | None

    @property
    def uncertainty(self) -> float | None:
        """How far the median or the ratio may be off, as a share of it: the larger of the two; None if not known."""
        spreads = (self.latency.spread, self.latency.ratio_spread)
        return max(spreads) if None not in spreads else None  # type: ignore[type-var]

    @property
    def is_certain(self) -> bool:
        return self.latency.steady and self.uncertainty is not None and self.uncertainty <= MOST_SPREAD


class BenchReport(Document):
    """`protocol` says what was timed and how. Ratios are over the first row of the same batch.

    `left_out` has, by name, why something was not timed.
    """

    bundle: str
    model: str
    created: str
    protocol: dict[str, str]
    device: dict[str, str]
    versions: dict[str, str]
    rows: list[BenchRow]
    left_out: dict[str, str]

    @property
    def uncertain(self) -> list[str]:
        """A line for each row whose figures are not to be trusted: the device was too busy, or never steady."""
        return [
            f"{row.name}, batch {row.latency.batch_size}: "
            + ("uncertain by " + ("?" if row.uncertainty is None else f"{row.uncertainty:.0%}"))
            + ("" if row.latency.steady else ", still drifting at the end")
            for row in self.rows
            if not row.is_certain
        ]

    def to_csv(self) -> str:
        """The rows, flat: a header, then a line each; what is not known is empty."""
        text = io.StringIO()
        flat = [self._flat(row) for row in self.rows]
        writer = csv.DictWriter(text, fieldnames=list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return text.getvalue()

    def _flat(self, row: BenchRow) -> dict[str, Any]:
        latency = row.latency.model_dump(exclude={"ratio_interval"})
        low, high = row.latency.ratio_interval or (None, None)
        memory = row.memory.model_dump() if row.memory else dict.fromkeys(PeakMemory.model_fields)
        return {
            **row.model_dump(exclude={"latency", "memory"}),
            **latency,
            "ratio_low": low,
            "ratio_high": high,
            **memory,
            "threads": self.protocol["threads"],
            "cpu": self.device["cpu"],
            "gpu": self.device.get("gpu"),
            "created": self.created,
        }

    def write(self, path: Path) -> None:
        """Write the file whole, as CSV or as JSON by the end of its name."""
        check_report_name(path)
        with new_file(path) as partial:
            partial.write_text(self.to_csv() if path.suffix == ".csv" else self.to_json(), encoding="utf-8")


def check_report_name(path: Path) -> None:
    """Raise `InputError` unless the name ends with .json or .csv and is no folder's."""
    if path.suffix not in (".json", ".csv") or path.is_dir():
        raise InputError(f"{path} is no file that a report can go to; give a name that ends with .json or .csv.")
