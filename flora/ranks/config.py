"""The rank config: which rank each target of a model gets. The one file between search and export."""

from collections.abc import Mapping

from flora.artifact import Document
from flora.errors import InputError, few
from flora.imagesets import ImageSetRecord
from flora.ranks.cost import LayerShape, Rank


class RankConfig(Document):
    """`ranks.json`: a rank or "dense" for every target of `model`, and where the choice came from.

    `pivoted` are the layers that are exported in pivoted form (`flora.lowrank.pivot`); `macs` and `params` count that.
    `latency_ms` is what a latency table predicts, `selection` is the images that it was chosen on.
    """

    model: str
    ranks: dict[str, Rank]
    pivoted: tuple[str, ...] = ()
    budget: str | None = None
    macs: int | None = None
    params: int | None = None
    latency_ms: float | None = None
    score: float | None = None
    origin: str | None = None
    selection: ImageSetRecord | None = None

    def check(self, *, model: str, shapes: Mapping[str, LayerShape]) -> None:
        """Raise `InputError` unless this config is for `model` and gives each of `shapes` a legal rank.

        Legal is "dense", or an integer from 1 to one below the full rank; no grid binds it.
        """
        if self.model != model:
            raise InputError(f"The rank config is for {self.model}, the model is {model}. Use a config of that model.")
        problems = []
        if missing := [name for name in shapes if name not in self.ranks]:
            problems.append(f"without a rank: {few(missing)}")
        if unexpected := [name for name in self.ranks if name not in shapes]:
            problems.append(f"not a target of this model: {few(unexpected)}")
        problems += [
            f"{name} has rank {rank}, allowed are 1 to {shapes[name].full_rank - 1} or "
            f'"dense" (full rank {shapes[name].full_rank})'
            for name, rank in self.ranks.items()
            if name in shapes and rank != "dense" and not 1 <= rank < shapes[name].full_rank
        ]
        if dense := [name for name in self.pivoted if self.ranks.get(name, "dense") == "dense"]:
            problems.append(f"pivoted without an integer rank: {few(dense)}")
        if problems:
            raise InputError(f"The rank config does not fit {model}: {few(problems, most=4)}.")
