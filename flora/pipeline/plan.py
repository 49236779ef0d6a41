"""What a compression would do, before it does anything: what is within reach, its steps, and about how long each takes.

Times come from passes of the dense model that are timed here, and from the multiplications of each step; reading images
is not counted. They are good to a factor of two.
"""

import time
from dataclasses import dataclass

import torch

from flora.imagesets import at_most
from flora.lowrank.checkpoint import LoadedModel
from flora.pipeline.compensate import COMPENSATION_IMAGES
from flora.pipeline.compress import FILTER_IMAGES, SEARCH_IMAGES, CompressRequest
from flora.pipeline.drop import HALVINGS
from flora.pipeline.notes import layers_with_few_tokens, note_on_few_tokens
from flora.pipeline.search import subnets_within_reach
from flora.pipeline.timed import check_budget
from flora.pipeline.training_free import TrainingFreeRequest
from flora.ranks.budget import asks_for_drop
from flora.ranks.cost import ModelCost
from flora.ranks.filtering import BINS
from flora.ranks.space import SearchSpace
from flora.training.data import TimmImages
from flora.training.filtering import RUNS_PER_BIN
from flora.training.sensitivity import MOST_PASSES

# Passes of the dense model that cost as much as ...
GRADIENT = 3.0  # a pass forward and one backward
SUBNET_STEP = 0.6 * GRADIENT  # a training step of a drawn subnet, whose MACs are three fifths on average
HALF = 0.5  # a pass from the middle of the model on, or of a search half of whose configs stop early
COMPENSATION = 9.0  # fitting all layers again: the weights of tokens, and each block run for each of its layers
VERIFICATION = 5.0  # the stages of a bundle
TRIED = HALVINGS + 1.0  # budgets of which a drop is tried
# Seconds that exporting and loading files takes whatever the model, and those of a group of the latency table.
EXPORTING, GROUP = 20.0, 8.0
# Batches that the whole models of the table run.
WHOLE_MODELS = 100
TIMED_BATCH, TIMED_REPEATS = 8, 3


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """One step, on so many images, and about how many seconds it takes."""

    what: str
    images: int | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`reach` holds MACs and parameters of the smallest, middle and largest subnet, and of the dense model.

    `notes` say what the bundle would say of the images.
    """

    reach: dict[str, tuple[int, int]]
    steps: tuple[PlannedStep, ...]
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)


def plan_of(model: LoadedModel, request: TrainingFreeRequest | CompressRequest) -> Plan:
    """The plan of either road."""
    if isinstance(request, TrainingFreeRequest):
        return plan_training_free(model, request)
    return plan_supernet(model, request)


def plan_training_free(model: LoadedModel, request: TrainingFreeRequest) -> Plan:
    """The plan of a compression without training; `InputError` for a budget that it would refuse."""
    cost = check_budget(model, request)
    calibration, selection = (_count(model, text) for text in request.image_sets)
    evaluation = _count(model, request.export.eval_data or request.image_sets[1])
    pass_s = _seconds_of_a_pass(model, request.device)
    # The moments of a layer's inputs: so many multiplications more than a pass has.
    moments = sum(layer.tokens * layer.in_features**2 for layer in cost.layers) / cost.dense_macs
    fitted = min(calibration, COMPENSATION_IMAGES)
    probes = min(len(cost.layers) * HALF + 1, MOST_PASSES)
    tried = [PlannedStep(what="trying budgets", images=selection, seconds=selection * TRIED * pass_s)]
    steps = [
        PlannedStep(what="factorizing", images=calibration, seconds=calibration * (GRADIENT + moments) * pass_s),
        PlannedStep(what="probing layers", images=selection, seconds=selection * probes * pass_s),
        *(tried if asks_for_drop(request.budget) else []),
        PlannedStep(what="compensating", images=fitted, seconds=fitted * (COMPENSATION + 2 * moments) * pass_s),
        _export_step(evaluation, pass_s),
    ]
    return _plan(request, cost, calibration, pass_s, steps)


def plan_supernet(model: LoadedModel, request: CompressRequest) -> Plan:
    """The plan of the paper's road; `InputError` for a budget that it would refuse."""
    cost = check_budget(model, request)
    space = request.space_of(cost)
    calibration, selection, training = (_count(model, text) for text in request.image_sets)
    evaluation = _count(model, request.export.eval_data or at_most(request.image_sets[1], SEARCH_IMAGES))
    filtered, searched = min(selection, FILTER_IMAGES), min(selection, SEARCH_IMAGES)
    pass_s = _seconds_of_a_pass(model, request.device)
    runs = sum(
        min(len(space.block_candidates(i)), BINS * RUNS_PER_BIN + sum(len(space.choices[name]) for name in block))
        for i, block in enumerate(space.blocks)
    )
    configs = request.search.population * (request.search.generations + 1)
    epochs, more = request.settings.epochs, request.finetune_epochs
    taught = 0.0 if request.teacher == "none" else 1.0
    steps = [
        PlannedStep(what="factorizing", images=calibration, seconds=calibration * GRADIENT * pass_s),
        PlannedStep(what="filtering candidates", images=filtered, seconds=filtered * runs * HALF * pass_s),
        PlannedStep(
            what=f"training the supernet, {epochs} epochs",
            images=training,
            seconds=training * epochs * (SUBNET_STEP + taught) * pass_s,
        ),
        PlannedStep(what="searching", images=searched, seconds=searched * configs * HALF * pass_s),
        PlannedStep(
            what=f"fine-tuning, {more} epochs",
            images=training,
            seconds=training * more * (SUBNET_STEP + taught) * pass_s,
        ),
        _export_step(evaluation, pass_s),
    ]
    return _plan(request, cost, calibration, pass_s, steps)


def _plan(
    request: TrainingFreeRequest | CompressRequest,
    cost: ModelCost,
    calibration: int,
    pass_s: float,
    steps: list[PlannedStep],
) -> Plan:
    lacking = layers_with_few_tokens(cost, calibration)
    return Plan(
        reach=_reach(request.space_of(cost), cost),
        steps=(*_latency_step(request, cost, pass_s), *steps),
        notes=(note_on_few_tokens(lacking),) if lacking else (),
    )


def _latency_step(
    request: TrainingFreeRequest | CompressRequest, cost: ModelCost, pass_s: float
) -> tuple[PlannedStep, ...]:
    """Measuring a latency table, where one is needed and not given."""
    if request.latency is None or request.latency_table is not None:
        return ()
    (batch,) = request.latency.batches
    groups = len({(layer.in_features, layer.out_features, layer.tokens) for layer in cost.layers})
    seconds = GROUP * groups + WHOLE_MODELS * batch * pass_s
    return (PlannedStep(what="measuring latency", images=None, seconds=seconds),)


def _reach(space: SearchSpace, cost: ModelCost) -> dict[str, tuple[int, int]]:
    subnets = subnets_within_reach(space, cost) | {"dense": cost.dense_ranks}
    return {name: (cost.macs(ranks), cost.params(ranks)) for name, ranks in subnets.items()}


def _export_step(images: int, pass_s: float) -> PlannedStep:
    return PlannedStep(
        what="exporting and verifying", images=images, seconds=EXPORTING + images * VERIFICATION * pass_s
    )


def _count(model: LoadedModel, text: str) -> int:
    return len(TimmImages(text, model.config.preprocessing))


@torch.inference_mode()
def _seconds_of_a_pass(model: LoadedModel, device: torch.device) -> float:
    """Seconds that one image takes in a batch, the fastest of some repeats."""
    module = model.module.to(device).eval()
    images = torch.zeros(TIMED_BATCH, *model.config.preprocessing.input_size, device=device)
    times = []
    for _ in range(TIMED_REPEATS + 1):
        started = time.perf_counter()
        module(images).sum().item()  # which waits for the device
        times.append(time.perf_counter() - started)
    return min(times[1:]) / TIMED_BATCH
