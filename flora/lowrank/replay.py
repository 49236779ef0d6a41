"""Running a model from one of its blocks on, again and again: what enters it is kept, earlier blocks are not run.

Earlier blocks pass their input through, so what lies between and around them still runs. That needs earlier blocks that
are called once and keep the shape of their input; otherwise the model is run as a whole.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from flora.lowrank.hooks import StopForwardError, removed_after

# The most that is kept of what enters a block; with more, every run is one of the whole model.
REPLAY_BYTES = 8 * 2**30


class Replay:
    """`blocks` are the names of all blocks in the order of their calls; `batches` gives the same images each time.

    What is kept lies on the CPU, whatever the model's device. The model is to be in eval mode. Runs that only look for
    what enters a block end there, but for the first batch, with `stops`.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], batches: Callable[[], Iterable[Tensor]], *, stops: bool = False
    ) -> None:
        self._model, self._batches, self._stops = model, batches, stops
        self._blocks = [model.get_submodule(name) for name in blocks]
        self._place = 0
        self._inputs: list[Tensor] | None = None

    def move_to(self, place: int) -> None:
        """Keep what enters block number `place`, which is not before the present one, or find that it cannot be."""
        if self._inputs is not None and place == self._place:
            return
        entered: list[Tensor] = []
        kept_shape: list[list[bool]] = [[] for _ in self._blocks[:place]]
        inputs: list[Tensor] = []

        def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            entered.append(args[0].detach().cpu())
            if self._stops and inputs:
                raise StopForwardError

        hooks = [self._blocks[place].register_forward_pre_hook(enter)]
        hooks += [
            block.register_forward_hook(
                lambda module, args, output, calls=calls: calls.append(args[0].shape == output.shape)
            )
            for block, calls in zip(self._blocks[:place], kept_shape, strict=True)
        ]
        device = next(self._model.parameters()).device
        with removed_after(hooks), self.active(), torch.no_grad():
            for batch in self._batches():
                entered.clear()
                for calls in kept_shape:
                    calls.clear()
                with suppress(StopForwardError):
                    self._model(batch.to(device))
                fits = sum(kept.nbytes for kept in (*inputs, *entered)) <= REPLAY_BYTES
                if not fits or len(entered) != 1 or any(calls != [True] for calls in kept_shape):
                    self._place, self._inputs = 0, None
                    return
                inputs += entered
        self._place, self._inputs = place, inputs

    @property
    def replays(self) -> bool:
        """Whether earlier blocks are left out in fact."""
        return self._inputs is not None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, each call of the model runs the next batch from the present block on."""
        if self._inputs is None:
            yield
            return
        waiting = iter(self._inputs)
        block, skipped = self._blocks[self._place], self._blocks[: self._place]
        original = block.forward
        for earlier in skipped:
            earlier.forward = lambda x, *args, **kwargs: x
        block.forward = lambda x, *args, **kwargs: original(next(waiting).to(x.device), *args, **kwargs)
        try:
            yield
        finally:
            for changed in (*skipped, block):
                del changed.forward
