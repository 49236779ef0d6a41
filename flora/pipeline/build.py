"""From a trained model and calibration images to a supernet folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from flora.artifact import check_replaceable
from flora.errors import InputError
from flora.lowrank.checkpoint import (
    SUPERNET_CONFIG,
    LayerRecord,
    LoadedModel,
    LoadedSupernet,
    SupernetConfig,
    load_supernet,
    save_supernet,
)
from flora.lowrank.supernet import Method, build_supernet, elastic_layers
from flora.lowrank.targets import PAPER_LAYERS, find_targets, trace_cost
from flora.lowrank.weights import weights_digest
from flora.pipeline.images import identity
from flora.pipeline.job import OnStart
from flora.provenance import now, versions
from flora.ranks.cost import ModelCost
from flora.ranks.space import DEFAULT_SPACE, space_from_text
from flora.resume import SETTINGS, Job
from flora.training.data import TimmImages


def build(
    model: LoadedModel,
    out: Path,
    *,
    data: str | None = None,
    layers: Sequence[str] = PAPER_LAYERS,
    method: Method = "activation",
    space: str = DEFAULT_SPACE,
    keep_redundant: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    restart: bool = False,
    on_start: OnStart = lambda done: None,
    on_layer: Callable[[str], None] = lambda name: None,
) -> LoadedSupernet:
    """Factorize the selected layers of `model` and write the supernet folder `out`; the model's module is used up.

    Where `out` is there with the same model, images and settings, it is returned as it is; not with `restart`.
    """
    check_replaceable(out, marker=SUPERNET_CONFIG)
    module, config = model.module, model.config
    if config.ranks:
        raise InputError(
            f"{model.folder} is factorized already; build from the dense model, or materialize its supernet again."
        )
    cost = trace_cost(module, find_targets(module, layers), config.preprocessing.input_size)
    search_space = space_from_text(space, cost, keep_redundant=keep_redundant)
    images = TimmImages(data, config.preprocessing, workers=workers) if data else None
    calibration = images.record() if images else None
    job = Job(
        settings={
            "model": weights_digest(module),
            "config": config.model_dump(mode="json", include={"model", "args", "preprocessing", "class_names"}),
            "layers": list(cost.shapes),
            "method": method,
            "space": search_space.model_dump(mode="json"),
            "calibration": identity(images, calibration) if images and calibration else None,
        }
    )
    done = not restart and job.is_in(out)
    on_start(done)
    if done:
        return load_supernet(out)
    dense_state = module.state_dict()
    spectra = build_supernet(
        module,
        cost,
        method=method,
        batches=images.images(batch_size) if images else None,
        on_layer=on_layer,
    )
    supernet = SupernetConfig(
        model=config.model,
        args=config.args,
        preprocessing=config.preprocessing,
        class_names=config.class_names,
        layers=_layer_records(module, cost, spectra),
        fixed_macs=cost.fixed_macs,
        fixed_params=cost.fixed_params,
        space=search_space,
        method=method,
        image_sets={"calibration": calibration} if calibration else {},
        source=str(model.folder or config.model),
        versions=versions(),
        created=now(),
    )
    save_supernet(out, module, dense_state, supernet, extra={SETTINGS: job})
    return LoadedSupernet(module=module, config=supernet, folder=Path(out))


def _layer_records(supernet: nn.Module, cost: ModelCost, spectra: dict[str, list[float]]) -> dict[str, LayerRecord]:
    return {
        name: LayerRecord(
            in_features=layer.in_features,
            out_features=layer.out_features,
            tokens=cost.shapes[name].tokens,
            bias=layer.bias is not None,
            mean_folded=layer.inner_bias is not None,
            spectrum=tuple(float(f"{energy:.6g}") for energy in spectra[name]),
        )
        for name, layer in elastic_layers(supernet).items()
    }
