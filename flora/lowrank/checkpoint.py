"""Models on disk: loading what the user brings, and the folders of dense, compact and supernet models.

A model folder holds `model.safetensors` and `config.json`: the timm name and arguments, preprocessing, class names, and
the rank of every factorized layer (none in a dense model). A supernet folder holds the nested factors, the dense model
that they came from, and `supernet.json`. Everything reloads without pickle.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from flora.artifact import Document, new_folder, sha256_of_file
from flora.errors import InputError
from flora.imagesets import ImageSetRecord, Role
from flora.lowrank.elastic import ElasticLinear
from flora.lowrank.factorize import Factors
from flora.lowrank.materialize import pair
from flora.lowrank.targets import linear_layers
from flora.lowrank.weights import create_timm_model, load_weights, read_weights, save_weights
from flora.preprocessing import Preprocessing
from flora.ranks.config import RankConfig
from flora.ranks.cost import LayerShape, ModelCost, Rank
from flora.ranks.space import SearchSpace

MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = "model.safetensors"
RANK_CONFIG = "ranks.json"
SUPERNET_CONFIG = "supernet.json"
SUPERNET_WEIGHTS = "supernet.safetensors"
DENSE_WEIGHTS = "dense.safetensors"
FILTER_REPORT = "filter.json"


class Reference(BaseModel):
    """The dense model that an artefact is verified against: its weights file and their SHA-256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str


class TrainingRecord(BaseModel):
    """One training run: settings, images and teacher by name, and what was noted at the end of each epoch.

    `changes` are settings that had other values up to an epoch (`until_epoch`), after which the run was stopped.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: str
    teacher: str | None
    settings: dict[str, Any]
    history: tuple[dict[str, Any], ...]
    changes: tuple[dict[str, Any], ...] = ()


class Compensation(BaseModel):
    """Factors fitted again on so many images: the divergence from the dense model before and after, in nats."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    before: float
    after: float

    @property
    def helps(self) -> bool:
        """Whether the new factors are kept."""
        return self.after < self.before


class ModelConfig(Document):
    """`config.json` of a model folder. `ranks` is empty in a dense model; `image_sets` is what it has seen, by role.

    The `pivoted` layers are two factors here, too, and get their form when the model is exported.
    """

    kind: Literal["flora model"] = "flora model"
    model: str
    args: dict[str, Any] = {}
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    ranks: dict[str, Rank] = {}
    pivoted: tuple[str, ...] = ()
    compensation: Compensation | None = None
    reference: Reference | None = None
    image_sets: dict[Role, ImageSetRecord] = {}
    training: tuple[TrainingRecord, ...] = ()


class LayerRecord(BaseModel):
    """One target in `supernet.json`: its shape, and the energy of each component (see `Factors.spectrum`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_features: int
    out_features: int
    tokens: int
    bias: bool
    mean_folded: bool
    spectrum: tuple[float, ...]


class SupernetConfig(Document):
    """`supernet.json`: the model, its targets with their cost, the search space, and how it was factorized."""

    kind: Literal["flora supernet"] = "flora supernet"
    model: str
    args: dict[str, Any] = {}
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    layers: dict[str, LayerRecord]
    fixed_macs: int
    fixed_params: int
    space: SearchSpace
    method: Literal["activation", "svd", "released"]
    image_sets: dict[Role, ImageSetRecord] = {}
    training: tuple[TrainingRecord, ...] = ()
    source: str
    versions: dict[str, str]
    created: str

    @property
    def cost(self) -> ModelCost:
        shapes = (
            LayerShape(name=name, in_features=layer.in_features, out_features=layer.out_features, tokens=layer.tokens)
            for name, layer in self.layers.items()
        )
        return ModelCost(layers=tuple(shapes), fixed_macs=self.fixed_macs, fixed_params=self.fixed_params)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A dense or compact model with its config; `folder` is None for a model that came from timm."""

    module: nn.Module
    config: ModelConfig
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True)
class LoadedSupernet:
    """A supernet with its config and the folder that it lies in."""

    module: nn.Module
    config: SupernetConfig
    folder: Path

    def load_dense(self) -> LoadedModel:
        """The dense model that the supernet came from."""
        config = ModelConfig(
            model=self.config.model,
            args=self.config.args,
            preprocessing=self.config.preprocessing,
            class_names=self.config.class_names,
        )
        return reference_from_path(config, self.folder)

    @property
    def reference(self) -> Reference:
        path = (self.folder / DENSE_WEIGHTS).absolute()
        return Reference(path=str(path), sha256=sha256_of_file(path))


def is_supernet_folder(path: Path) -> bool:
    return (Path(path) / SUPERNET_CONFIG).is_file()


def content_digest(folder: Path) -> str:
    """A digest of what a model or supernet folder holds; not of when, where and with what it was made."""
    folder = Path(folder)
    if is_supernet_folder(folder):
        supernet = SupernetConfig.load(folder / SUPERNET_CONFIG)
        config = supernet.model_dump_json(exclude=_PLACES | {"source": True, "versions": True, "created": True})
    else:
        config = ModelConfig.load(folder / MODEL_CONFIG).model_dump_json(exclude=_PLACES | {"reference": {"path"}})
    names = (SUPERNET_WEIGHTS, DENSE_WEIGHTS, FILTER_REPORT, MODEL_WEIGHTS, RANK_CONFIG)
    files = [f"{name} {sha256_of_file(folder / name)}" for name in names if (folder / name).is_file()]
    return hashlib.sha256("\n".join([config, *files]).encode()).hexdigest()


# Where images, and a teacher that is a folder, lay.
_PLACES: dict[str, Any] = {"image_sets": {"__all__": {"spec"}}, "training": {"__all__": {"images", "teacher"}}}


def load_model(
    model: str,
    *,
    args: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    untrained: bool = False,
) -> LoadedModel:
    """The model that a user names: a model folder of ours, or a timm name with a checkpoint or pretrained weights.

    Only what does not depend on weights takes an `untrained` one.
    """
    if Path(model).is_dir():
        if args or checkpoint or pretrained:
            raise InputError(
                f"{model} is a model folder: it brings its own arguments and weights; "
                "leave out --checkpoint, --pretrained and --model-kwargs."
            )
        return load_model_folder(Path(model))
    if not (checkpoint or pretrained or untrained):
        if not timm.is_model(model):
            create_timm_model(model, {})
        raise InputError(
            f"{model} would have random weights, which show nothing; give --checkpoint FILE or --pretrained."
        )
    module = create_timm_model(model, args or {}, pretrained=pretrained)
    if checkpoint:
        load_weights(module, read_weights(checkpoint), origin=str(checkpoint))
    config = ModelConfig(model=model, args=dict(args or {}), preprocessing=preprocessing_of(module, args or {}))
    return LoadedModel(module=module, config=config)


def preprocessing_of(module: nn.Module, args: Mapping[str, Any]) -> Preprocessing:
    """timm's settings for the model, with the size and channels that `args` give it.

    A grey model gets the mean of the three channels' means and deviations.
    """
    settings = resolve_model_data_config(module)
    channels, *size = settings["input_size"]
    if "img_size" in args:
        side = args["img_size"]
        size = list(side) if isinstance(side, (list, tuple)) else [side, side]
    channels = args.get("in_chans", channels)
    if channels == 1:
        settings |= {key: (sum(settings[key]) / len(settings[key]),) for key in ("mean", "std")}
    try:
        return Preprocessing(
            **{key: settings[key] for key in Preprocessing.model_fields if key != "input_size"},
            input_size=(channels, *size),
        )
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise InputError(f"The model's images cannot be prepared: {problem}. Only grey and RGB images are.") from error


def load_model_folder(folder: Path) -> LoadedModel:
    """A dense or compact model from its folder."""
    folder = Path(folder)
    if not (folder / MODEL_CONFIG).is_file():
        raise InputError(f"{folder} is no model folder: it holds no {MODEL_CONFIG}.")
    config = ModelConfig.load(folder / MODEL_CONFIG)
    module = create_timm_model(config.model, config.args)
    for name, layer in linear_layers(module, config.ranks).items():
        rank = config.ranks[name]
        shape = LayerShape(name=name, in_features=layer.in_features, out_features=layer.out_features, tokens=1)
        if shape.is_factored(rank, pivoted=name in config.pivoted):
            down = nn.Linear(layer.in_features, rank, bias=False)
            module.set_submodule(name, pair(down, nn.Linear(rank, layer.out_features, bias=layer.bias is not None)))
    load_weights(module, read_weights(folder / MODEL_WEIGHTS), origin=str(folder / MODEL_WEIGHTS))
    return LoadedModel(module=module.eval(), config=config, folder=folder)


def load_reference(config: ModelConfig, path: Path | None = None) -> LoadedModel | None:
    """The dense model that a compact one is verified against, or None where its recorded file is gone.

    `path` (a weights file, or a model or supernet folder) takes the place of the recorded one. A recorded file whose
    content has changed is an `InputError`.
    """
    if path is None:
        if config.reference is None or not Path(config.reference.path).is_file():
            return None
        path = Path(config.reference.path)
        if sha256_of_file(path) != config.reference.sha256:
            raise InputError(
                f"The dense reference {path} has changed since the ranks were chosen; name it with --reference to "
                "verify against it all the same, or build and materialize again."
            )
    return reference_from_path(config, path)


def reference_from_path(config: ModelConfig, path: Path) -> LoadedModel:
    """The dense form of `config`'s model with the weights at `path`: a file, or a model or supernet folder."""
    inside = (Path(path) / DENSE_WEIGHTS, Path(path) / MODEL_WEIGHTS, Path(path))
    weights = next((file for file in inside if file.is_file()), None)
    if weights is None:
        raise InputError(f"{path} is no dense reference; give a weights file, or a model or supernet folder.")
    dense = ModelConfig(
        model=config.model, args=config.args, preprocessing=config.preprocessing, class_names=config.class_names
    )
    module = create_timm_model(dense.model, dense.args)
    load_weights(module, read_weights(weights), origin=str(weights))
    return LoadedModel(module=module, config=dense, folder=weights.parent)


def save_model(
    folder: Path,
    module: nn.Module,
    config: ModelConfig,
    *,
    ranks: RankConfig | None = None,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, Document] | None = None,
) -> None:
    """Write a model folder atomically, with `ranks` as a file of its own; `dtype` stores weights in less precision.

    `extra` are documents of a step, by file name.
    """
    state = {name: tensor.to(dtype) if dtype else tensor for name, tensor in module.state_dict().items()}
    with new_folder(folder, marker=MODEL_CONFIG) as partial:
        save_weights(partial / MODEL_WEIGHTS, state)
        if ranks is not None:
            ranks.save(partial / RANK_CONFIG)
        for name, document in (extra or {}).items():
            document.save(partial / name)
        config.save(partial / MODEL_CONFIG)


def save_supernet(
    folder: Path,
    supernet: nn.Module,
    dense_state: Mapping[str, Tensor],
    config: SupernetConfig,
    *,
    extra: Mapping[str, Document] | None = None,
) -> None:
    """Write a supernet folder atomically; `extra` are documents of a step, by file name."""
    with new_folder(folder, marker=SUPERNET_CONFIG) as partial:
        save_weights(partial / SUPERNET_WEIGHTS, supernet.state_dict())
        save_weights(partial / DENSE_WEIGHTS, dense_state)
        for name, document in (extra or {}).items():
            document.save(partial / name)
        config.save(partial / SUPERNET_CONFIG)


def load_supernet(folder: Path) -> LoadedSupernet:
    """A supernet from its folder, every layer at full rank."""
    folder = Path(folder)
    if not is_supernet_folder(folder):
        raise InputError(f"{folder} is no supernet folder: it holds no {SUPERNET_CONFIG}. `flora build` writes one.")
    config = SupernetConfig.load(folder / SUPERNET_CONFIG)
    module = create_timm_model(config.model, config.args)
    for name, record in config.layers.items():
        module.set_submodule(name, _empty_elastic(record))
    load_weights(module, read_weights(folder / SUPERNET_WEIGHTS), origin=str(folder / SUPERNET_WEIGHTS))
    return LoadedSupernet(module=module.eval(), config=config, folder=folder)


def _empty_elastic(record: LayerRecord) -> ElasticLinear:
    full_rank = min(record.in_features, record.out_features)
    return ElasticLinear(
        Factors(
            down=torch.empty(full_rank, record.in_features),
            up=torch.empty(record.out_features, full_rank),
            inner_bias=torch.empty(full_rank) if record.mean_folded else None,
            bias=torch.empty(record.out_features) if record.bias else None,
            spectrum=torch.empty(0),
        )
    )
