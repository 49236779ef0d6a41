"""A torch module behind the runner protocol, eager or compiled: what exports are compared with."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from export.inputs import ImageInput
from flora.errors import BackendMissingError


class TorchRunner:
    """Runs `module` in eval mode on `device`; inside the block the module lies there, after it where it was.

    `input_size` [C, H, W] is what images are held against. `compiled`, torch.compile makes one graph of the module for
    each shape of images; where it does not, nothing is run.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        device: str = "cpu",
        input_size: tuple[int, ...] | None = None,
        compiled: bool = False,
    ) -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise BackendMissingError(f"torch finds no GPU for device {device}; run on the cpu.")
        self.name = name
        self.described: Mapping[str, str] = {}
        self.provider = f"torch {device}{', compiled by Inductor' if compiled else ''}"
        self._module = module
        self._forward: Callable[[Tensor], Tensor] = CompiledModule(module) if compiled else module
        self._device = device
        self._input_size = input_size
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
        return self._forward(self._sent(images)).float().cpu().numpy()

    def bind(self, images: np.ndarray) -> Callable[[], object]:
        """A call that runs `images` and waits; they lie on the device already, and what comes out stays there."""
        tensor = self._sent(images)

        @torch.inference_mode()
        def run() -> None:
            self._forward(tensor)
            if tensor.is_cuda:
                torch.cuda.synchronize(tensor.device)

        return run

    def _sent(self, images: np.ndarray) -> Tensor:
        size = (None,) * (images.ndim - 1) if self._input_size is None else self._input_size
        ImageInput(dtype=np.float32, shape=(None, *size)).check(images, self.name)
        return torch.from_numpy(np.ascontiguousarray(images)).to(self._device, next(self._module.parameters()).dtype)


class CompiledModule:
    """A module through torch.compile, as one graph for each shape of its input.

    torch runs eagerly, without an error, where its settings or environment say so; here that is a
    `BackendMissingError`, as is a compiler that is missing or fails.
    """

    def __init__(self, module: nn.Module) -> None:
        self._graphs = 0
        self._shapes: set[torch.Size] = set()
        self._compiled = torch.compile(module, backend=self._build, fullgraph=True, dynamic=False)

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.shape not in self._shapes:
            self._compile(tensor)
            self._shapes.add(tensor.shape)
        return self._compiled(tensor)

    def _compile(self, tensor: Tensor) -> None:
        from torch._dynamo.exc import TorchDynamoException

        before = self._graphs
        try:
            self._compiled(tensor)
        except TorchDynamoException as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
            raise BackendMissingError(
                f"torch.compile does not work here for batches of {len(tensor)} ({reason}). On a CPU it needs a C++ "
                "compiler (on Debian: apt-get install g++), on a GPU the package triton; or leave the runtime out."
            ) from error
        if self._graphs == before:
            raise BackendMissingError(
                "torch.compile built nothing and ran the model eagerly. Look at TORCH_COMPILE_DISABLE and "
                "TORCHDYNAMO_DISABLE in the environment, or leave the runtime out."
            )

    def _build(self, graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable:
        from torch._dynamo import lookup_backend

        built = lookup_backend("inductor")(graph, examples)
        self._graphs += 1
        return built
