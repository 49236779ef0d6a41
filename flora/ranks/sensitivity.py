"""What the rank of a layer costs in accuracy, without training: spectra say how, one probe of the model how much.

The energy that a rank discards (the sum of the spectrum behind it) is the expected squared error of the layer's output.
How much the model minds differs from layer to layer by orders of magnitude: so each layer is cut once, alone, and the
model's divergence from the dense one is measured. A layer's error at any rank is that divergence, scaled by discarded
energies; the model's error is the sum over its layers.
"""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from flora.ranks.allocate import Choice
from flora.ranks.budget import Limit
from flora.ranks.cost import LayerShape, ModelCost, Rank
from flora.ranks.space import SearchSpace

# The share of the full rank at which a layer is probed: low enough that most layers show an error above the noise.
PROBE_SHARE = 1 / 8


class LayerSensitivity(BaseModel):
    """One layer's probe: the mean Kullback-Leibler divergence from the dense model, in nats, at one rank."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    divergence: float


def probe_rank(layer: LayerShape) -> int:
    """The rank at which `layer` is probed."""
    return max(1, round(PROBE_SHARE * layer.full_rank))


class AdditiveModel:
    """The error of a whole model as a sum over its layers; `spectra` are energies by component, largest first."""

    def __init__(self, spectra: Mapping[str, Sequence[float]], probes: Mapping[str, LayerSensitivity]) -> None:
        self._spectra, self._probes = spectra, probes

    def layer_error(self, name: str, rank: Rank) -> float:
        """The divergence that the layer adds at `rank`, in nats."""
        if rank == "dense":
            return 0.0
        spectrum, probe = self._spectra[name], self._probes[name]
        discarded = sum(spectrum[probe.rank :])
        return probe.divergence * sum(spectrum[rank:]) / discarded if discarded > 0 else 0.0

    def error(self, ranks: Mapping[str, Rank]) -> float:
        """The divergence of the model at `ranks`, in nats."""
        return sum(self.layer_error(name, rank) for name, rank in ranks.items())

    def choices(self, space: SearchSpace, cost: ModelCost, budget: Limit) -> list[list[Choice]]:
        """Every rank choice of every layer, with what it costs of `budget` and the error that it adds."""
        return [
            [
                Choice(
                    ranks={name: rank},
                    cost=budget.layer_cost(cost.shapes[name], rank),
                    error=self.layer_error(name, rank),
                )
                for rank in choices
            ]
            for name, choices in space.choices.items()
        ]
