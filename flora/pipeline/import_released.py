"""From the files that FLORA's authors released to supernets, compact models, rank configs and search spaces."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flora.artifact import check_replaceable, sha256_of_file
from flora.errors import InputError, few
from flora.lowrank.checkpoint import (
    MODEL_CONFIG,
    SUPERNET_CONFIG,
    LayerRecord,
    LoadedModel,
    LoadedSupernet,
    ModelConfig,
    Reference,
    SupernetConfig,
    load_supernet,
    preprocessing_of,
    reference_from_path,
    save_model,
    save_supernet,
)
from flora.lowrank.released import (
    ReleasedCheckpoint,
    make_compact,
    make_elastic,
    ranks_from_svd_config,
    read_released,
    space_from_pickle,
    timm_state,
)
from flora.lowrank.targets import find_targets, trace_cost
from flora.lowrank.weights import create_timm_model, load_weights, read_weights
from flora.provenance import now, versions
from flora.ranks.config import RankConfig
from flora.ranks.cost import ModelCost, Rank
from flora.ranks.space import space_from_text


def import_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    model: str,
    args: Mapping[str, Any],
    svd_config: Path | None = None,
    dense: Path | None = None,
) -> LoadedSupernet | LoadedModel:
    """Write the supernet or subnet in `checkpoint`, for timm's `model`, as the supernet or compact model folder `out`.

    `svd_config` is the yaml that a subnet must agree with. `dense` are the weights that low rank is compared with;
    without them, a supernet is compared with itself at full rank.
    """
    module = create_timm_model(model, args)
    config = ModelConfig(model=model, args=dict(args), preprocessing=preprocessing_of(module, args))
    released = read_released(checkpoint, module)
    cost = trace_cost(module, released.ranks, config.preprocessing.input_size)
    if not released.is_supernet:
        return _write_compact(module, released, config, cost, checkpoint, out, svd_config=svd_config, dense=dense)
    if svd_config is not None:
        raise InputError(
            f"{checkpoint} is a supernet, which holds every rank. Import {svd_config} by itself and give the ranks to "
            "`flora materialize --ranks`."
        )
    check_replaceable(out, marker=SUPERNET_CONFIG)
    dense_state = module.state_dict() if dense is None else _dense_state(dense, config)
    supernet = SupernetConfig(
        model=config.model,
        args=config.args,
        preprocessing=config.preprocessing,
        layers=_layer_records(cost, make_elastic(module, released), released),
        fixed_macs=cost.fixed_macs,
        fixed_params=cost.fixed_params,
        space=space_from_text("eighths" if _is_base(cost) else "sixths", cost),
        method="released",
        source=str(checkpoint),
        versions=versions(),
        created=now(),
    )
    save_supernet(out, module, dense_state, supernet)
    return LoadedSupernet(module=module, config=supernet, folder=Path(out))


def _write_compact(
    module: nn.Module,
    released: ReleasedCheckpoint,
    config: ModelConfig,
    cost: ModelCost,
    checkpoint: Path,
    out: Path,
    *,
    svd_config: Path | None,
    dense: Path | None,
) -> LoadedModel:
    check_replaceable(out, marker=MODEL_CONFIG)
    if svd_config is not None:
        wanted, ranks = ranks_from_svd_config(svd_config, cost), released.ranks
        if other := [f"{name} {ranks[name]}, not {rank}" for name, rank in wanted.items() if ranks[name] != rank]:
            raise InputError(f"{checkpoint} is not the subnet of {svd_config}: the rank of {few(other, 3)}.")
    reference = None
    if dense is not None:
        if not Path(dense).is_file():
            raise InputError(f"{dense} is no weights file; give the dense model's safetensors or torch file.")
        reference_from_path(config, dense)
        reference = Reference(path=str(Path(dense).absolute()), sha256=sha256_of_file(dense))
    make_compact(module, released)
    compact = config.model_copy(update={"ranks": released.ranks, "reference": reference})
    chosen = _rank_config(config.model, released.ranks, cost, origin=f"released subnet {checkpoint.name}")
    save_model(out, module, compact, ranks=chosen)
    return LoadedModel(module=module, config=compact, folder=Path(out))


def import_ranks(svd_config: Path, out: Path, *, model: str, args: Mapping[str, Any]) -> tuple[RankConfig, ModelCost]:
    """Write the ranks of a released yaml for timm's `model` as the rank config `out`; also returns the model's cost."""
    module = create_timm_model(model, args)
    cost = trace_cost(module, find_targets(module), preprocessing_of(module, args).input_size)
    ranks = ranks_from_svd_config(svd_config, cost)
    config = _rank_config(model, ranks, cost, origin=f"released SVD_CONFIG {svd_config.name}")
    config.save(out)
    return config, cost


def import_space(pickle: Path, supernet: Path, out: Path) -> LoadedSupernet:
    """Write `supernet` again as the folder `out`, with the filtered search space of a released pickle."""
    check_replaceable(out, marker=SUPERNET_CONFIG)
    loaded = load_supernet(supernet)
    space = space_from_pickle(pickle, loaded.config.cost)
    config = loaded.config.model_copy(update={"space": space})
    save_supernet(out, loaded.module, loaded.load_dense().module.state_dict(), config)
    return LoadedSupernet(module=loaded.module, config=config, folder=Path(out))


def _rank_config(model: str, ranks: dict[str, Rank], cost: ModelCost, *, origin: str) -> RankConfig:
    return RankConfig(model=model, ranks=ranks, macs=cost.macs(ranks), params=cost.params(ranks), origin=origin)


def _dense_state(weights: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The state dict of timm's model with `weights`, which may be in the layout of the released code."""
    module = create_timm_model(config.model, config.args)
    load_weights(module, timm_state(read_weights(weights), module, origin=str(weights)), origin=str(weights))
    return module.state_dict()


def _is_base(cost: ModelCost) -> bool:
    """Whether the paper searches this model on its grid of eighths, as it does DeiT-B."""
    return {layer.full_rank for layer in cost.layers} == {768}


def _layer_records(
    cost: ModelCost, spectra: Mapping[str, list[float]], released: ReleasedCheckpoint
) -> dict[str, LayerRecord]:
    return {
        layer.name: LayerRecord(
            in_features=layer.in_features,
            out_features=layer.out_features,
            tokens=layer.tokens,
            bias=f"{layer.name}.bias" in released.dense,
            mean_folded=False,
            spectrum=tuple(float(f"{energy:.6g}") for energy in spectra[layer.name]),
        )
        for layer in cost.layers
    }
