"""Weights in and out: timm models, state dicts from safetensors and torch files, and errors that name the keys.

Nothing pickled is run: torch files are read as plain weights only.
"""

import errno
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import load_state_dict
from torch import Tensor, nn

from flora.errors import InputError, few, near_matches


def create_timm_model(name: str, args: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """A timm model in eval mode; an unknown name or argument is an `InputError` with near matches."""
    if not timm.is_model(name):
        hint = near_matches(name.split(".")[0], timm.list_models())
        raise InputError(f"{name!r} is neither a folder here nor a model that timm knows.{hint}")
    try:
        return timm.create_model(name, pretrained=pretrained, **args).eval()
    except (TypeError, AssertionError, ValueError, KeyError, RuntimeError, OSError) as error:
        advice = " If its weights cannot be fetched, give a file with --checkpoint." if pretrained else ""
        raise InputError(
            f"timm cannot create {name} with {json.dumps(dict(args))}: {_reason(error)}.{advice}"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from safetensors or a torch checkpoint, without running any pickled code.

    timm's own wrappers are opened: averaged weights first, then `state_dict` or `model`.
    """
    if not Path(path).is_file():
        raise InputError(f"The weights file {path} does not exist.")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        return load_state_dict(str(path), weights_only=True)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or no safetensors file ({error}); copy or write it again.") from error
    except (RuntimeError, EOFError, OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as a checkpoint of plain weights: {_reason(error)}.") from error


def load_weights(module: nn.Module, state: Mapping[str, Tensor], *, origin: str) -> None:
    """Copy `state` into `module`; `InputError` lists the keys that are missing, unexpected or of another shape."""
    own = module.state_dict()
    problems = []
    if missing := [name for name in own if name not in state]:
        problems.append(f"missing: {few(missing)}")
    if unexpected := [name for name in state if name not in own]:
        problems.append(f"unexpected: {few(unexpected)}")
    if foreign := [name for name in own if name in state and not isinstance(state[name], Tensor)]:
        problems.append(f"that hold no tensor: {few(foreign)}")
    elif misshapen := [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]:
        problems.append(f"of another shape: {few(misshapen)}")
    if problems:
        raise InputError(
            f"{origin} does not fit the model; keys {'; '.join(problems)}. "
            "Use the weights of this model; a timm name takes arguments (num_classes) with --model-kwargs."
        )
    module.load_state_dict(state)


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write `state` as safetensors, readable by everybody."""
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library gives the system's error as text only.
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error), str(path)) from error
    path.chmod(0o644)  # the library writes files that only their owner can read


def weights_digest(module: nn.Module) -> str:
    """A digest of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
