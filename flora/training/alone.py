"""This process by itself, with the part of Accelerate's `Accelerator` that a training run uses.

Inside a group of processes, a run that belongs to one of them alone (a block's local supernet) must not wait for the
others, which `Accelerator` always does.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from flora.errors import InputError


class Alone:
    """One process, full precision or bf16."""

    num_processes = 1
    process_index = 0
    is_main_process = True
    scaler = None

    def __init__(self, device: torch.device, precision: Literal["no", "fp16", "bf16"] = "no") -> None:
        self.device = device
        if precision == "fp16":
            raise InputError("A local supernet trains in full precision or bf16; choose one with --precision.")
        self._autocast = precision == "bf16"

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        return model, optimizer

    def no_sync(self, model: nn.Module) -> AbstractContextManager:
        return nullcontext()

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def wait_for_everyone(self) -> None:
        return
