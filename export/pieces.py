"""The own error of every piece of a file: each is given what the reference has at the cuts, and its output is compared.

One layer after the other and one image at a time, on ONNX Runtime's CPU provider. Between layers only those tensors
live that a later one reads: `BYTES_AT_ONCE` of them, or those of one image where these are more.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto, helper

from export.cuts import FOUND, Graph, Layer, as_model, piece, taken_by
from export.graph_runs import Run, power, run_of
from flora.errors import InputError, few

BYTES_AT_ONCE = 256 * 2**20
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
CODES = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What makes the tensor `name` of the suspect file out of those that it `takes` at the cuts.

    `rounded` are the nodes that quantize activations in it, `inner` the tensors within it that are looked at: what is
    quantized there, and what FP16 may not hold.
    """

    name: str
    nodes: list[NodeProto]
    takes: list[str]
    rounded: list[NodeProto]
    inner: list[str]
    has_codes: bool
    has_quantized_weights: bool
    has_weights: bool
    is_half: bool


@dataclass(kw_only=True)
class Seen:
    """Sums over the images of one tensor at a cut; `is_unfed` where FP16 does not hold what its piece is given.

    `noise` is the error's power, `weights_noise` the same with activations not quantized. `broken` is the first tensor,
    this one or one within its piece, that is not finite.
    """

    signal: float = 0.0
    noise: float = 0.0
    weights_noise: float = 0.0
    largest: float = 0.0
    broken: str = ""
    has_nan: bool = False
    is_unfed: bool = False


def piece_of(graph: Graph, name: str, cuts: Collection[str]) -> Piece:
    """The piece of `graph` that makes the tensor `name`."""
    nodes = piece(graph, [name], cuts)
    takes = taken_by(nodes, cuts)
    codes = [node for node in nodes if node.op_type in CODES]
    rounded = [node for node in codes if node.op_type == CODES[0] and node.input[0] not in graph.constants]
    made = [output for node in nodes if node not in codes for output in node.output if output not in cuts]
    halves = [output for output in made if graph.types.get(output) == TensorProto.FLOAT16]
    return Piece(
        name=name,
        nodes=nodes,
        takes=takes,
        rounded=rounded,
        inner=list(dict.fromkeys([*halves, *(node.input[0] for node in rounded if node.input[0] in made)])),
        has_codes=bool(codes),
        has_quantized_weights=any(node.op_type == CODES[1] and node.input[0] in graph.constants for node in codes),
        has_weights=any(
            value in graph.constants and graph.constants[value].data_type in FLOATS
            for node in nodes
            for value in node.input
        ),
        is_half=bool(halves) or any(graph.types[end] == TensorProto.FLOAT16 for end in (name, *takes)),
    )


class Comparer:
    """Runs two graphs piece by piece over images; `seen` is by tensor, `largest_rounded` by what is quantized."""

    def __init__(
        self, reference: Graph, suspect: Graph, layers: Sequence[Layer], *, threads: int | None, as_written: bool
    ) -> None:
        self._reference, self._suspect, self._layers = reference, suspect, layers
        self._threads, self._as_written = threads, as_written
        names = [name for layer in layers for name in layer.made]
        self._cuts = {reference.input, *names}
        self.pieces = {name: piece_of(suspect, name, self._cuts) for name in names}
        self.seen = {name: Seen() for name in names}
        self.largest_rounded: dict[str, float] = {}
        self._nodes = nodes = {layer: piece(reference, layer.made, self._cuts) for layer in layers}
        known = {reference.input}
        for layer in layers:
            known.update(layer.made)
            if unknown := [name for name in self._takes(layer) if name not in known]:
                raise InputError(
                    f"{suspect.path} makes {few(layer.made)} out of {few(unknown)}, which come later in "
                    f"{reference.path}; give two files of the same model."
                )
        self._read_last = {
            name: position
            for position, layer in enumerate(layers)
            for name in (*taken_by(nodes[layer], self._cuts), *self._takes(layer))
        }

    def look(self, images: np.ndarray) -> None:
        """Compare on images [B, C, H, W]: first on one, which shows how many can be held at once."""
        size = max(1, BYTES_AT_ONCE // self._pass(images[:1]))
        for start in range(1, len(images), size):
            self._pass(images[start : start + size])

    def _takes(self, layer: Layer) -> list[str]:
        return list(dict.fromkeys(name for made in layer.made for name in self.pieces[made].takes))

    def _pass(self, images: np.ndarray) -> int:
        """Compare on these images at once; the most bytes that were held between layers."""
        values = [{self._reference.input: images[i : i + 1]} for i in range(len(images))]
        most = 0
        for position, layer in enumerate(self._layers):
            expect, find, find_unrounded = self._runs(layer)
            takes = self._takes(layer)
            for held in values:
                held |= expect(held)
                given = {name: _as_type(held[name], self._suspect.types[name]) for name in takes}
                found = find(given)
                self._keep(layer, held, given, found, find_unrounded(given) if find_unrounded else found)
            most = max(most, sum(array.nbytes for held in values for array in held.values()))
            for held in values:
                for name in [name for name in held if self._read_last.get(name, -1) <= position]:
                    del held[name]
        return most

    def _runs(self, layer: Layer) -> tuple[Run, Run, Run | None]:
        """What computes a layer in the reference, in the suspect, and there with activations as they are."""
        nodes = self._nodes[layer]
        given = [name for name in taken_by(nodes, self._cuts) if name not in layer.made]
        expect = run_of(as_model(self._reference, nodes, given, layer.made), self._reference, self._threads)
        wanted = {id(node) for name in layer.made for node in self.pieces[name].nodes}
        suspect_nodes = [node for node in self._suspect.model.graph.node if id(node) in wanted]
        rounded = {node.output[0]: node.input[0] for name in layer.made for node in self.pieces[name].rounded}
        unrounded = {
            node.output[0]: rounded[node.input[0]]
            for node in suspect_nodes
            if node.op_type == CODES[1] and node.input[0] in rounded
        }
        inner = list(dict.fromkeys(name for made in layer.made for name in self.pieces[made].inner))
        made = [FOUND.format(name) for name in layer.made]

        def find(gives: Sequence[str], instead: dict[str, str]) -> Run:
            model = as_model(
                self._suspect, suspect_nodes, self._takes(layer), gives, renamed=layer.made, instead=instead
            )
            return run_of(model, self._suspect, self._threads, as_written=self._as_written)

        return expect, find([*made, *inner], {}), find(made, unrounded) if unrounded else None

    def _keep(
        self,
        layer: Layer,
        expected: dict[str, np.ndarray],
        given: dict[str, np.ndarray],
        found: dict[str, np.ndarray],
        unrounded: dict[str, np.ndarray],
    ) -> None:
        """Add what one image shows of one layer."""
        beyond = {name for name in given if not _is_finite(given[name])}
        for name in layer.made:
            part, seen, values = self.pieces[name], self.seen[name], expected[name]
            if values.dtype.kind != "f":
                continue
            if not _is_finite(values):
                raise InputError(
                    f"{self._reference.path} gives {name} of {layer.name} values that are not finite, so nothing can "
                    "be compared with it; give a file that is sound, or other images."
                )
            now = found[FOUND.format(name)]
            if now.shape != values.shape:
                raise InputError(
                    f"{self._suspect.path} gives {name} the shape {list(now.shape)}, {self._reference.path} "
                    f"{list(values.shape)}; give two files of the same model."
                )
            for within in part.inner:
                maker = self._suspect.makers[within]
                if maker.op_type == "Cast" and maker.input[0] in self._cuts and not _is_finite(found[within]):
                    beyond.add(maker.input[0])
                    if maker.input[0] in self.seen:  # the layer that made it is to blame
                        self.seen[maker.input[0]].broken = maker.input[0]
            seen.is_unfed |= bool(beyond & set(part.takes))
            looked_at = {**{within: found[within] for within in part.inner}, name: now}
            broken = next((tensor for tensor, array in looked_at.items() if not _is_finite(array)), None)
            if broken is not None and not seen.is_unfed and not seen.broken:
                seen.broken, seen.has_nan = broken, bool(np.isnan(looked_at[broken]).any())
            seen.largest = max(seen.largest, float(np.abs(values).max(initial=0)))
            seen.signal += power(values)
            seen.noise += power(values - now)
            seen.weights_noise += power(values - unrounded[FOUND.format(name)])
            for node in part.rounded:
                tensor = node.input[0]
                largest = float(np.abs((given if tensor in given else found)[tensor]).max(initial=0))
                self.largest_rounded[tensor] = max(self.largest_rounded.get(tensor, 0.0), largest)


def _as_type(values: np.ndarray, wanted: int) -> np.ndarray:
    """What is beyond the type becomes infinite."""
    with np.errstate(over="ignore"):
        return values.astype(helper.tensor_dtype_to_np_dtype(wanted), copy=False)


def _is_finite(values: np.ndarray) -> bool:
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())
