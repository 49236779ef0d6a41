"""The files that FLORA's authors released (github.com/shadowpa0327/FLORA), read into flora's own forms.

* A factorized layer of their supernet is `VT.weight` [f, in] without a bias and `U.weight` [out, f] with `U.bias`; in a
  subnet the pair is cut at a rank, or is one dense `fc` where the rank ratio is 1. Other names are those of timm in
  2021: their Swin merges patches at the end of a stage, timm now at the start of the next.
* A rank config is a yaml with `SVD_CONFIG`: for each block (in Swin, for each stage and block) the rank ratios of qkv,
  fc1 and fc2.
* A filtered search space is a pickle: for each block its candidates, each with a ratio for every layer of the model, 1
  outside that block. It is read by an unpickler that makes numbers, lists and tuples, and calls nothing of the file's.
"""

import io
import itertools
import pickle
import pickletools
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from flora.errors import InputError, few
from flora.lowrank.elastic import ElasticLinear
from flora.lowrank.factorize import Factors
from flora.lowrank.materialize import pair
from flora.lowrank.weights import load_weights, read_weights
from flora.ranks.cost import LayerShape, ModelCost, Rank, break_even_rank
from flora.ranks.space import MOST_CANDIDATES, SearchSpace, blocks_of

LEAVES = ("VT.weight", "U.weight", "U.bias", "fc.weight", "fc.bias")
MOST_PICKLE_BYTES = 16 * 2**20
MOST_YAML_BYTES = 2**20
# What reading bytes that are no pickle can raise.
NO_PICKLE = (
    pickle.PickleError,
    struct.error,
    AttributeError,
    EOFError,
    LookupError,
    OverflowError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, kw_only=True)
class ReleasedCheckpoint:
    """A released checkpoint under timm's names, checked against the model it is for.

    `pairs` are the factors `down` [r, in] and `up` [out, r] of the layers that have them, `ranks` the rank of every
    layer that the authors' code treats as factorized, and `dense` all weights with each pair multiplied out.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    ranks: dict[str, Rank]
    dense: dict[str, Tensor]

    @property
    def is_supernet(self) -> bool:
        """Whether every layer has both factors at full rank."""
        return self.pairs.keys() == self.ranks.keys() and set(self.ranks.values()) == {"dense"}


def read_released(path: Path, model: nn.Module) -> ReleasedCheckpoint:
    """The checkpoint at `path`, whose dense form is loaded into `model` in place.

    Raises `InputError` for a file that holds more than weights, that lacks the released layers, or that is for another
    model.
    """
    state = timm_state(_read_plain_weights(path), model, origin=str(path))
    if twofold := [name for name in state if re.search(r"\.(VT|U)\.\d+\.weight$", name)]:
        raise InputError(
            f"{path} holds several pairs of factors for one layer ({few(twofold, 2)}), made with CHOICES_BLOCK_CONFIG; "
            "only checkpoints with one pair a layer can be imported."
        )
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = {name: {leaf: state.pop(key) for leaf in LEAVES if (key := f"{name}.{leaf}") in state} for name in linears}
    layers = {name: parts for name, parts in found.items() if parts}
    if not layers and not any(name.endswith(("VT.weight", "U.weight")) for name in state):
        raise InputError(
            f"{path} has no layer in the released form (VT and U, or fc). "
            "Plain weights of a timm model go to `flora build NAME --checkpoint FILE`."
        )
    dtype = next(model.parameters()).dtype
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    ranks: dict[str, Rank] = {}
    for name, parts in layers.items():
        if parts.keys() <= {"fc.weight", "fc.bias"}:
            ranks[name] = "dense"
            state |= {f"{name}.{leaf.removeprefix('fc.')}": tensor for leaf, tensor in parts.items()}
            continue
        down, up = (factor.to(dtype).contiguous() for factor in _factor_pair(name, parts, origin=str(path)))
        pairs[name] = down, up
        ranks[name] = down.shape[0] if down.shape[0] < min(down.shape[1], up.shape[0]) else "dense"
        state[f"{name}.weight"] = up @ down
        if "U.bias" in parts:
            state[f"{name}.bias"] = parts["U.bias"]
    load_weights(model, state, origin=str(path))
    return ReleasedCheckpoint(pairs=pairs, ranks=ranks, dense=state)


def _read_plain_weights(path: Path) -> dict[str, Tensor]:
    try:
        return read_weights(path)
    except InputError as error:
        text, cause = "", error.__cause__
        while cause is not None:
            text, cause = f"{text} {cause}", cause.__cause__
        refused = re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"Unsupported globals: ([\w.]+\w)", text)
        if refused is None:
            raise
        raise InputError(
            f"{path} holds more than weights ({refused[1]}), which could only be read by running code from it. Where "
            "you trust it, write its weights alone, with the libraries that made it installed: "
            f"""python -c "import torch; all = torch.load('{path}', map_location='cpu', weights_only=False); """
            """torch.save({'model': all['model']}, 'weights.pth')" and import weights.pth."""
        ) from error


def timm_state(state: Mapping[str, Any], model: nn.Module, *, origin: str) -> dict[str, Tensor]:
    """`state` under the names that timm has today; buffers that timm computes are checked and left out.

    Raises `InputError` for entries that are no tensors, and for windows that count positions in another way.
    """
    if foreign := [str(name) for name, value in state.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{origin} is no state dict: {few(foreign)} hold no tensor.")
    own, buffers = model.state_dict(), dict(model.named_buffers())
    merges_at_the_end = "layers.0.downsample.reduction.weight" in state
    renamed = {}
    for name, tensor in state.items():
        if name.endswith(".relative_position_index"):
            if name in buffers and not torch.equal(tensor.flatten(), buffers[name].flatten()):
                raise InputError(f"{origin} does not fit the model: {name} belongs to another window size.")
        elif not name.endswith(".attn_mask"):
            stage = re.match(r"layers\.(\d+)\.(downsample\..+)", name)
            if stage and merges_at_the_end:
                name = f"layers.{int(stage[1]) + 1}.{stage[2]}"
            elif name.startswith("head.") and name not in own and name.replace("head.", "head.fc.") in own:
                name = name.replace("head.", "head.fc.")
            renamed[name] = tensor
    return renamed


def _factor_pair(name: str, parts: Mapping[str, Tensor], *, origin: str) -> tuple[Tensor, Tensor]:
    if parts.keys() - {"U.bias"} != {"VT.weight", "U.weight"}:
        raise InputError(f"{origin}: {name} has {few(parts)}; allowed are VT and U, or fc in their place.")
    down, up = parts["VT.weight"], parts["U.weight"]
    if down.ndim != 2 or up.ndim != 2 or not 1 <= down.shape[0] == up.shape[1] <= min(down.shape[1], up.shape[0]):
        raise InputError(
            f"{origin}: {name} has VT {list(down.shape)} and U {list(up.shape)}; allowed are [r, in] and [out, r]."
        )
    return down, up


def make_elastic(model: nn.Module, released: ReleasedCheckpoint) -> dict[str, list[float]]:
    """Replace the layers of `model` in place by elastic ones that hold the released factors.

    Returns the squared Frobenius norm of each component: the squared singular values, until training moves them.
    """
    spectra = {}
    for name, (down, up) in released.pairs.items():
        spectrum = down.double().square().sum(1) * up.double().square().sum(0)
        factors = Factors(down=down, up=up, inner_bias=None, bias=released.dense.get(f"{name}.bias"), spectrum=spectrum)
        model.set_submodule(name, ElasticLinear(factors))
        spectra[name] = spectrum.tolist()
    return spectra


def make_compact(model: nn.Module, released: ReleasedCheckpoint) -> None:
    """Replace the layers of `model` in place by two linears where that is cheaper; the others stay dense."""
    for name, (down, up) in released.pairs.items():
        rank, (out_features, in_features) = down.shape[0], (up.shape[0], down.shape[1])
        if rank < break_even_rank(in_features, out_features):
            bias = released.dense.get(f"{name}.bias")
            first = nn.Linear(in_features, rank, bias=False)
            second = nn.Linear(rank, out_features, bias=bias is not None)
            first.load_state_dict({"weight": down})
            second.load_state_dict({"weight": up} | ({} if bias is None else {"bias": bias}))
            model.set_submodule(name, pair(first, second))


def ranks_from_svd_config(path: Path, cost: ModelCost) -> dict[str, Rank]:
    """The ranks that a released yaml gives the layers of `cost`; a ratio of 1 or none means "dense".

    Raises `InputError` for a file without `SVD_CONFIG`, or one for a model of another family, width or depth.
    """
    blocks = blocks_of(cost.shapes)
    has_stages = blocks[0][0].startswith("layers.")
    family = "SWIN" if has_stages else "DEIT"
    document = _read_yaml(path)
    sections = document.get("MODEL") if isinstance(document, dict) else None
    section = sections.get(family) if isinstance(sections, dict) else None
    if not isinstance(section, dict) or not (config := section.get("SVD_CONFIG")):
        raise InputError(
            f"{path} holds no MODEL.{family}.SVD_CONFIG, the rank ratios of a subnet of this model. The released yaml "
            "files of subnets have one, those of supernets and teachers have none."
        )
    width = cost.shapes[blocks[0][0]].in_features
    if section.get("EMBED_DIM", width) != width:
        raise InputError(f"{path} is for a model of width {_shown(section['EMBED_DIM'])}, this one has width {width}.")
    depths = tuple(Counter(block[0].split(".")[1] for block in blocks).values()) if has_stages else (len(blocks),)
    given = config if has_stages else [config]
    if not _is_list(given) or not all(_is_list(stage) for stage in given) or tuple(map(len, given)) != depths:
        lengths = (
            few(str(len(stage)) if _is_list(stage) else _shown(stage) for stage in given) if _is_list(given) else "no"
        )
        raise InputError(
            f"{path} is for a model of another depth: SVD_CONFIG gives {lengths} blocks, this model has "
            f"{few(map(str, depths))}."
        )
    ranks: dict[str, Rank] = {}
    for block, ratios in zip(blocks, itertools.chain(*given), strict=True):
        if not _is_list(ratios) or len(ratios) != len(block):
            raise InputError(
                f"{path}: SVD_CONFIG gives {_shown(ratios)} for {few(block)}; one ratio for each is allowed."
            )
        for name, ratio in zip(block, ratios, strict=True):
            ratio = 1.0 if ratio in (None, "None") else ratio
            ranks[name] = _rank_of(cost.shapes[name], ratio, origin=str(path))
    return ranks


def _read_yaml(path: Path) -> Any:
    text = _read_bytes(path, MOST_YAML_BYTES, kind="a released yaml")
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is no plain yaml file: {' '.join(str(error).split())[:200]}.") from error


def space_from_pickle(path: Path, cost: ModelCost) -> SearchSpace:
    """The filtered search space in a released pickle, for the layers of `cost`.

    Ranks that cost as much as the dense layer become "dense", and candidates that coincide then count once. The largest
    one is added to each block, as the released loader does, and the smallest; candidates ascend in cost. Raises
    `InputError` for a pickle that asks for anything but numbers, or is for another model.
    """
    blocks = blocks_of(cost.shapes)
    content = _unpickle_numbers(path)
    if not _is_list(content) or len(content) != len(blocks):
        given = f"{len(content)} blocks" if _is_list(content) else _shown(content)
        raise InputError(f"{path} is for another model: it holds {given}, this model has {len(blocks)} blocks.")
    choices: dict[str, tuple[Rank, ...]] = {}
    candidates = []
    for index, (block, given) in enumerate(zip(blocks, content, strict=True)):
        start = sum(map(len, blocks[:index]))
        shapes = [cost.shapes[name] for name in block]
        kept = _block_candidates(given, start, shapes, total=len(cost.layers), origin=f"{path}, block {index}")
        for name, ranks in zip(block, zip(*kept, strict=True), strict=True):
            factored = sorted({rank for rank in ranks if rank != "dense"})
            choices[name] = (*factored, "dense")
        ends = [tuple(choices[name][end] for name in block) for end in (0, -1)]
        candidates.append(tuple(sorted({*kept, *ends}, key=lambda ranks: (_macs(shapes, ranks), str(ranks)))))
    return SearchSpace(choices=choices, blocks=blocks, candidates=tuple(candidates))


def _block_candidates(
    given: Any, start: int, shapes: Sequence[LayerShape], *, total: int, origin: str
) -> list[tuple[Rank, ...]]:
    """The ranks of one block in each candidate of `given`, whose ratios for `shapes` begin at `start`."""
    if not _is_list(given) or not 1 <= len(given) <= MOST_CANDIDATES:
        raise InputError(f"{origin}: a list of 1 to {MOST_CANDIDATES:,} candidates is allowed.")
    found = []
    for ratios in given:
        if not _is_list(ratios) or len(ratios) != total:
            raise InputError(f"{origin}: a candidate must give {total} ratios, one for each layer of this model.")
        own = ratios[start : start + len(shapes)]
        if any(ratio != 1 for ratio in (*ratios[:start], *ratios[start + len(shapes) :])):
            raise InputError(f"{origin}: a candidate has ratios below 1 outside its block.")
        found.append(tuple(_cheapest(shape, ratio, origin=origin) for shape, ratio in zip(shapes, own, strict=True)))
    return found


def _cheapest(shape: LayerShape, ratio: Any, *, origin: str) -> Rank:
    rank = _rank_of(shape, ratio, origin=origin)
    return rank if shape.is_factored(rank) else "dense"


def _macs(shapes: Sequence[LayerShape], ranks: Sequence[Rank]) -> int:
    return sum(shape.macs(rank) for shape, rank in zip(shapes, ranks, strict=True))


def _rank_of(shape: LayerShape, ratio: Any, *, origin: str) -> Rank:
    """The rank that the released code gives a ratio of the full rank."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise InputError(
            f"{origin}: {shape.name} has the rank ratio {_shown(ratio)}; it lies above 0 and at most at 1."
        )
    rank = round(ratio * shape.full_rank)
    if rank < 1:
        raise InputError(f"{origin}: {shape.name} has the rank ratio {ratio}, which is below one component.")
    return "dense" if rank == shape.full_rank else rank


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _shown(value: Any) -> str:
    """A value of a foreign file for a message: never long, whatever it holds."""
    if isinstance(value, str | float | None) or (isinstance(value, int) and abs(value) < 10**9):
        return repr(value)[:40]
    return f"({type(value).__name__}{f' of {len(value)}' if _is_list(value) else ''})"


def _read_bytes(path: Path, most: int, *, kind: str) -> bytes:
    if not Path(path).is_file():
        raise InputError(f"The file {path} does not exist.")
    if (size := Path(path).stat().st_size) > most:
        raise InputError(f"{path} has {size:,} bytes; {kind} has at most {most:,}.")
    return Path(path).read_bytes()


def _unpickle_numbers(path: Path) -> Any:
    """What a pickle of numbers, numpy scalars, lists and tuples holds, the scalars as Python's numbers."""
    data = _read_bytes(path, MOST_PICKLE_BYTES, kind="a released search space")
    try:
        _check_operations(data, origin=str(path))
        return _NumbersUnpickler(io.BytesIO(data), origin=str(path)).load()
    except InputError:
        raise
    except NO_PICKLE as error:
        raise InputError(f"{path} is damaged or no pickle of a search space: {error}.") from error


def _check_operations(data: bytes, *, origin: str) -> None:
    """Refuse, before anything is built, a memo that would take all memory, an early end, and what must be hashed.

    Nested tuples as keys can take forever, and a search space has no keys.
    """
    asked, words = "", ["", ""]
    for opcode, argument, _ in pickletools.genops(data):
        if isinstance(argument, str):
            words = [words[1], argument]
        if opcode.name in ("GLOBAL", "INST"):
            asked = words[1].replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            asked = ".".join(words)
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(data):
            raise InputError(f"{origin} is damaged or no pickle of a search space (memo {argument}).")
        if opcode.name in ("EMPTY_DICT", "DICT", "EMPTY_SET", "FROZENSET"):
            raise InputError(
                f"{origin} holds a dictionary or a set{f', after asking for {asked[:80]}' if asked else ''}; a search "
                "space holds numbers alone, and nothing was run."
            )


class _NumbersUnpickler(pickle.Unpickler):
    """Gives stand-ins for numpy's scalars, and refuses every other global by name without importing it."""

    def __init__(self, file: io.BytesIO, *, origin: str) -> None:
        super().__init__(file)
        self.origin = origin

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "dtype"):
            return _NumberType
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
            return _NumberMaker()
        asked = f"{module}.{name}"[:80]
        raise InputError(
            f"{self.origin} asks for {asked}; a search space holds numbers alone, and nothing was run. "
            "Do not use a file that you do not trust."
        )


class _NumberType:
    """Stands in for `numpy.dtype`: the plain number types, in either byte order."""

    __slots__ = ("code", "order")
    codes = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q"}

    def __init__(self, name: str, *_: object) -> None:
        if not isinstance(name, str) or name not in self.codes:
            raise InputError(f"The pickle holds a numpy scalar of type {_shown(name)}; numbers alone are allowed.")
        self.code, self.order = self.codes[name], "<"

    def __setstate__(self, state: Sequence[object]) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise InputError(f"The pickle holds a numpy scalar of byte order {_shown(state[1])}.")
        self.order = ">" if state[1] == ">" else "<"


class _NumberMaker:
    """Stands in for numpy's `scalar`: a number from its type and bytes."""

    __slots__ = ()

    def __call__(self, kind: _NumberType, data: bytes) -> float:
        if not isinstance(kind, _NumberType) or not isinstance(data, bytes):
            raise InputError("The pickle holds a numpy scalar that is no number.")
        return struct.unpack(kind.order + kind.code, data)[0]
