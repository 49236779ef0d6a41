"""The trained models of the benchmark `paper_road`: their images, budgets and how long each arm trains."""

from dataclasses import dataclass
from pathlib import Path

from flora.training.settings import TrainingSettings, training_settings

HERE = Path(__file__).parent
DENSE = HERE / "models"
LAYERS = ("qkv", "proj", "fc1", "fc2")
# Shares of the full rank, fine where ranks are low: the budgets here are.
SPACE = "ratios=0.03125,0.0625,0.125,0.1875,0.25,0.375,0.5,0.625,0.75,1"


@dataclass(frozen=True, kw_only=True)
class RoadModel:
    """One model: budgets in percent of its MACs, the hardest last; images by role, disjoint."""

    name: str
    budgets: tuple[int, ...]
    headline: int
    seeds: int
    training: TrainingSettings
    train: str
    select: str
    rescore: str
    test: str

    @property
    def hardest(self) -> int:
        return self.budgets[-1]

    @property
    def is_compared(self) -> bool:
        """Whether uniform ranks are trained for its budgets, too."""
        return len(self.budgets) > 1


def road_models(fashion: Path, cifar_train: Path | None, cifar_test: Path | None) -> dict[str, RoadModel]:
    """The models whose images are at hand."""
    where = f"torch/fashion_mnist,root={fashion}"
    images = {
        "train": f"{where},split=train,except=1/6",
        "select": f"{where},split=train,fold=1/12",
        "rescore": f"{where},split=train,fold=7/12",
        "test": f"{where},split=validation",
    }
    models = {
        "fashion7": RoadModel(
            name="fashion7", budgets=(20, 15, 10), headline=15, seeds=3, training=_training(epochs=4), **images
        ),
        "swin": RoadModel(name="swin", budgets=(58,), headline=58, seeds=1, training=_training(epochs=1), **images),
    }
    if cifar_train and cifar_test:
        colour = {
            "seeds": 1,
            "training": _training(epochs=2),
            "train": f"{cifar_train},except=1/10",
            "select": f"{cifar_train},fold=1/20",
            "rescore": f"{cifar_train},fold=11/20",
            "test": str(cifar_test),
        }
        models["cifar"] = RoadModel(name="cifar", budgets=(45, 30, 20), headline=45, **colour)
        # On top of other compression, and of a compact hybrid: a further 21 %, the least that the paper claims.
        for name in ("cifar-pruned", "cifar-hybrid"):
            models[name] = RoadModel(name=name, budgets=(79,), headline=79, **colour)
    return models


def _training(epochs: int) -> TrainingSettings:
    return training_settings(epochs=epochs, batch_size=128, learning_rate=5e-4, warmup_epochs=0.1)
