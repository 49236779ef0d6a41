"""One process or many, the same code: who writes, and how independent work is spread (through Accelerate).

Under `torchrun --no-python ... flora ...` each process takes every n-th item and all of them get all results, in the
order of the items. Items are computed whole by one process, so that results do not depend on how many there are.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object

from flora.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

# torch's 10 or 30 minutes end a job in which the others wait for the one that builds, exports or trains.
PATIENCE = timedelta(days=7)


def processes(device: torch.device | None = None) -> PartialState:
    """The processes that run this command; `device` matters in the first call only."""
    return PartialState(cpu=device is None or device.type == "cpu", timeout=PATIENCE)


def accelerator(device: torch.device, precision: str) -> Accelerator:
    """Accelerate's `Accelerator` for one training run; the precision may differ from that of an earlier run.

    It moves no model, for its moves copy parameters, and an optimizer of rank segments holds views of them.
    """
    if precision == "fp16" and device.type == "cpu":
        raise InputError("fp16 needs a GPU, for it scales the loss there; on a CPU use --precision no, or bf16.")
    processes(device)
    AcceleratorState._reset_state(reset_partial_state=False)
    return Accelerator(cpu=device.type == "cpu", mixed_precision=precision, device_placement=False)


def spread(items: Sequence[Item], compute: Callable[[Item], Result]) -> list[Result]:
    """`compute` of every item, in the order of `items`, each by one of the processes; results must be picklable."""
    state = processes()
    mine = [(i, compute(items[i])) for i in range(state.process_index, len(items), state.num_processes)]
    everyone = gather_object(mine) if state.num_processes > 1 else mine
    return [result for _, result in sorted(everyone, key=lambda pair: pair[0])]


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return processes().is_main_process


def wait() -> None:
    """Return when every process has come here."""
    processes().wait_for_everyone()
