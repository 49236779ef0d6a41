"""The trained models of the benchmark `paper_road`: their images, budgets and how long each arm trains."""

from dataclasses import dataclass
from pathlib import Path

from flora.training.settings import TrainingSettings, training_settings

HERE = Path(__file__).parent
DENSE = HERE / "models"
LAYERS = ("qkv", "proj", "fc1", "fc2")


@dataclass(frozen=True, kw_only=True)
class RoadModel:
    """One model: budgets in percent of its MACs, the hardest last; images by role, disjoint.

    `below` are budgets under the hardest one, which the road goes on to: where uniform ranks lose more than the road
    does, its MACs at their accuracy lie there.
    """

    name: str
    budgets: tuple[int, ...]
    below: tuple[int, ...] = ()
    headline: int
    space: str
    seeds: int
    training: TrainingSettings
    train: str
    select: str
    rescore: str
    test: str
    has_images: bool = True

    @property
    def can_run(self) -> bool:
        """Whether its images are here, and its dense model is trained."""
        return self.has_images and (DENSE / self.name / "config.json").is_file()

    @property
    def road_budgets(self) -> tuple[int, ...]:
        return self.budgets + self.below

    @property
    def hardest(self) -> int:
        return self.budgets[-1]

    @property
    def is_compared(self) -> bool:
        """Whether uniform ranks are trained for its budgets, too."""
        return len(self.budgets) > 1


def road_models(
    fashion: Path, cifar_train: Path | None, cifar_test: Path | None, *, precision: str = "no"
) -> dict[str, RoadModel]:
    """All models, trained in `precision`; those of CIFAR-10 have no images where none are given."""

    def training(epochs: int) -> TrainingSettings:
        return training_settings(
            epochs=epochs, batch_size=128, learning_rate=5e-4, warmup_epochs=0.1, precision=precision
        )

    where = f"torch/fashion_mnist,root={fashion}"
    images = {
        "train": f"{where},split=train,except=1/6",
        "select": f"{where},split=train,fold=1/12",
        "rescore": f"{where},split=train,fold=7/12",
        "test": f"{where},split=validation",
    }
    models = {
        "fashion7": RoadModel(
            name="fashion7",
            budgets=(20, 15, 10),
            below=(7,),
            headline=15,
            # Fine where ranks are low: these budgets are.
            space="ratios=0.03125,0.046875,0.0625,0.083334,0.125,0.1875,0.25,0.375,0.5,1",
            seeds=3,
            training=training(4),
            **images,
        ),
        "swin": RoadModel(
            name="swin", budgets=(58,), headline=58, space="eighths", seeds=1, training=training(4), **images
        ),
    }
    colour = {
        "space": "sixteenths",
        "seeds": 1,
        "training": training(4),
        "train": f"{cifar_train},except=1/10",
        "select": f"{cifar_train},fold=1/20",
        "rescore": f"{cifar_train},fold=11/20",
        "test": str(cifar_test),
        "has_images": cifar_train is not None and cifar_test is not None,
    }
    models["cifar"] = RoadModel(name="cifar", budgets=(45, 30, 20), below=(14,), headline=45, **colour)
    # On top of other compression, and of a compact hybrid: a further 21 %, the least that the paper claims.
    for name in ("cifar-pruned", "cifar-hybrid"):
        models[name] = RoadModel(name=name, budgets=(79,), headline=79, **colour)
    return models
