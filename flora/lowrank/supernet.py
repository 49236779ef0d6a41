"""The supernet: a timm model whose targets are elastic, so that any rank config can be tried without copying."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from flora.errors import InputError, few
from flora.lowrank.elastic import ElasticLinear
from flora.lowrank.factorize import Factors, factorize_activation, factorize_svd
from flora.lowrank.statistics import collect_statistics, layer_groups
from flora.lowrank.targets import linear_layers
from flora.ranks.cost import ModelCost, Rank

Method = Literal["activation", "svd"]


def build_supernet(
    model: nn.Module,
    cost: ModelCost,
    *,
    method: Method = "activation",
    batches: Iterable[Tensor] | None = None,
    on_layer: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Replace the targets of `model` in place by elastic layers at full rank; return the spectrum of each.

    `batches` yields calibration images [B, C, H, W] and is iterated once per group of layers; `activation` needs it.
    Nothing is replaced before every layer is factorized.
    """
    if method not in ("activation", "svd"):
        raise InputError(f"The factorization {method!r} is unknown; use activation or svd.")
    if method == "activation" and batches is None:
        raise InputError(
            f"The activation-aware factorization has no statistics for {few(cost.shapes)}; "
            "give calibration images, or use the method svd."
        )
    if method == "svd" and batches is not None:
        raise InputError("The method svd looks at no images; leave them out, or use the method activation.")
    factors: dict[str, Factors] = {}
    for group in layer_groups(cost.layers):
        layers = linear_layers(model, group)
        statistics = collect_statistics(model, batches, layers, weigh_tokens=True) if batches is not None else {}
        for name, layer in layers.items():
            if method == "activation":
                factors[name] = factorize_activation(layer, statistics.pop(name))
            else:
                factors[name] = factorize_svd(layer)
            on_layer(name)
    for name in list(factors):
        model.set_submodule(name, ElasticLinear(factors[name]))
    return {name: part.spectrum.tolist() for name, part in factors.items()}


def elastic_layers(supernet: nn.Module) -> dict[str, ElasticLinear]:
    """The elastic layers of a supernet by name."""
    return {name: module for name, module in supernet.named_modules() if isinstance(module, ElasticLinear)}


def set_ranks(supernet: nn.Module, ranks: Mapping[str, Rank]) -> None:
    """Set the active rank of every elastic layer in place; `ranks` must name exactly these layers."""
    layers = elastic_layers(supernet)
    if missing := [name for name in layers if name not in ranks]:
        raise InputError(f"No rank is given for {few(missing)}.")
    if unexpected := [name for name in ranks if name not in layers]:
        raise InputError(f"Ranks are given for layers that are not elastic: {few(unexpected)}.")
    if wrong := [f"{name}: {rank}" for name, rank in ranks.items() if not layers[name].allows(rank)]:
        raise InputError(f'A rank lies between 1 and the full rank, or is "dense"; got {few(wrong)}.')
    for name, layer in layers.items():
        layer.set_rank(ranks[name])


@contextmanager
def active_ranks(supernet: nn.Module, ranks: Mapping[str, Rank]) -> Iterator[nn.Module]:
    """Set `ranks` inside the `with` block and restore the former ones behind it."""
    before = {name: layer.rank for name, layer in elastic_layers(supernet).items()}
    set_ranks(supernet, ranks)
    try:
        yield supernet
    finally:
        set_ranks(supernet, before)
