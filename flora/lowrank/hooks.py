"""What is common to looking into a forward pass: hooks that go again, and an end to the pass once enough was seen."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


class StopForwardError(Exception):
    """What is needed was seen: the rest of the model need not run."""


@contextmanager
def removed_after(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """The `hooks` are there inside the block, and not behind it."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
