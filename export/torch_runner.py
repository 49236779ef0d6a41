"""A torch module behind the runner protocol: what exports are compared with."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import nn

from flora.errors import BackendMissingError


class TorchRunner:
    """Runs `module` in eval mode on `device`; inside the block the module lies there, after it where it was."""

    def __init__(self, module: nn.Module, *, name: str, device: str = "cpu") -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise BackendMissingError(f"torch finds no GPU for device {device}; run on the cpu.")
        self.name = name
        self.provider = f"torch {device}"
        self.described: Mapping[str, str] = {}
        self._module = module
        self._device = device
        self._home = next(module.parameters()).device
        self._training: list[nn.Module] = []

    def __enter__(self) -> Self:
        self._training = [layer for layer in self._module.modules() if layer.training]
        self._module.eval().to(self._device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._module.to(self._home)
        for layer in self._training:
            layer.training = True

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits [B, classes], float32, of images [B, C, H, W]."""
        tensor = torch.from_numpy(np.ascontiguousarray(images)).to(self._device, self._dtype)
        return self._module(tensor).float().cpu().numpy()

    def bind(self, images: np.ndarray) -> Callable[[], object]:
        """A call that runs `images` and waits; they lie on the device already, and what comes out stays there."""
        tensor = torch.from_numpy(np.ascontiguousarray(images)).to(self._device, self._dtype)

        @torch.inference_mode()
        def run() -> None:
            self._module(tensor)
            if tensor.is_cuda:
                torch.cuda.synchronize(tensor.device)

        return run

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._module.parameters()).dtype
