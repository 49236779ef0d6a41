"""Training resumes to the bit, moves what a step has used and nothing else, and stops where it cannot go on."""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from flora.errors import FloraError, InputError
from flora.lowrank.supernet import active_ranks, build_supernet, elastic_layers, set_ranks
from flora.ranks.cost import ModelCost
from flora.ranks.space import SearchSpace, blocks_of
from flora.training.alone import Alone
from flora.training.augmentation import AUGMENTATIONS, Augmentation, AugmentedImages
from flora.training.data import TimmImages
from flora.training.evaluate import evaluate
from flora.training.processes import accelerator
from flora.training.settings import TrainingSettings
from flora.training.teacher import TeacherCache, TeacherFacts
from flora.training.train import Teacher, Trainer
from tests.samples import GREY, random_images, tiny_model

CPU = torch.device("cpu")
STEPS_PER_EPOCH = 5
STILL = Augmentation(scale=(1, 1), ratio=(1, 1), hflip=0)
MIXED = Augmentation(mixup=0.8, cutmix=1.0)
RANKS = (6, 12, 24, "dense")


class StoppedError(Exception):
    pass


class Bench:
    """Makes training runs on twenty images: three epochs of five steps of four images, where nothing else is said."""

    def __init__(self, folder: Path, images: Path, cost: ModelCost) -> None:
        self.folder, self.images, self.cost = folder, TimmImages(str(images), GREY), cost
        self.factorized = supernet_of(cost)

    def space(self, ranks: tuple = RANKS) -> SearchSpace:
        names = list(self.cost.shapes)
        return SearchSpace(choices=dict.fromkeys(names, ranks), blocks=blocks_of(names))

    def teacher(self, *, cached: str | None = None, top_k: int = 10) -> Teacher:
        module = named_as_grey(tiny_model(seed=5))
        if cached is None:
            return Teacher(module=module)
        facts = TeacherFacts(teacher_sha256="t", classes=10, top_k=top_k, transform="t")
        keys = tuple(int(digest, 16) for digest in self.images.digests())
        return Teacher(module=module, cache=TeacherCache(self.folder / cached, facts), image_keys=keys)

    def trainer(
        self,
        model: nn.Module | None = None,
        *,
        state: str = "state.pt",
        ranks: tuple = RANKS,
        augmentation: Augmentation = AUGMENTATIONS["light"],
        teacher: Teacher | None = None,
        supernet: nn.Module | None = None,
        together=None,
        **changes,
    ) -> Trainer:
        """A run of `model` as it is, or of `supernet` (a fresh one) with `ranks` to choose from."""
        settings = TrainingSettings(
            **{"epochs": 3, "batch_size": 4, "learning_rate": 1e-3, "augmentation": augmentation} | changes
        )
        if model is None and supernet is None:
            supernet = copy.deepcopy(self.factorized)
        trained = supernet if model is None else model
        return Trainer(
            named_as_grey(trained),
            AugmentedImages(self.images, augmentation, seed=settings.seed),
            settings,
            accelerator=together or Alone(CPU, settings.precision),
            state_file=self.folder / state,
            space=self.space(ranks) if model is None else None,
            cost=self.cost if model is None else None,
            teacher=teacher,
        )

    def trained(self, model: nn.Module | None = None, *, state: str = "state.pt", **options) -> Tensor:
        """The weights after a whole run that leaves no state behind."""
        trained = weights(self.trainer(model, state=state, **options).run())
        (self.folder / state).unlink()
        return trained


@pytest.fixture
def bench(tmp_path: Path, image_folder: Path, vit_cost: ModelCost) -> Bench:
    return Bench(tmp_path, image_folder, vit_cost)


@pytest.fixture
def marked(tmp_path: Path, vit_cost: ModelCost) -> Bench:
    """Images that show their class: a bright square, each class at a place of its own."""
    noise = np.random.default_rng(0)
    for number in range(20):
        pixels = noise.integers(0, 60, (28, 28), dtype=np.uint8)
        row, column = divmod(number % 10, 4)
        pixels[8 * row :][:7, 7 * column :][:, :7] = 250
        path = tmp_path / "marked" / str(number % 10) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return Bench(tmp_path, tmp_path / "marked", vit_cost)


def supernet_of(cost: ModelCost) -> nn.Module:
    model = tiny_model()
    build_supernet(model, cost, method="svd")
    return model


def named_as_grey(model: nn.Module) -> nn.Module:
    """`model` with the normalization of the images, which timm's distillation reads there."""
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": GREY.mean, "std": GREY.std}
    return model


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def components(supernet: nn.Module) -> dict[str, list[Tensor]]:
    """The factors of each layer with the components along dimension 0, copied."""
    factors = {
        name: [part for part in (layer.down, layer.up.T, layer.inner_bias) if part is not None]
        for name, layer in elastic_layers(supernet).items()
    }
    return {name: [part.detach().clone() for part in parts] for name, parts in factors.items()}


def stop_at(step: int) -> Callable[[int, float], None]:
    def on_step(done: int, loss: float) -> None:
        if done == step:
            raise StoppedError

    return on_step


RESUMED = {
    "AdamW": {},
    "SGD with momentum": {"optimizer": "sgd", "learning_rate": 1e-2},
    "average": {"ema_decay": 0.8},
    "sandwich": {"sandwich": 1},
    "accumulation": {"accumulation": 2},
    "mixed images": {"augmentation": MIXED},
    "dropped patches": {"patch_drop": 0.5},
    "warm-up": {"warmup_epochs": 1.5},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("step", [3, 8])
def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(bench: Bench, options: dict, step: int):
    whole = bench.trainer(state="whole.pt", **options)
    expected = weights(whole.run())
    with pytest.raises(StoppedError):
        bench.trainer(**options).run(on_step=stop_at(step))
    resumed = bench.trainer(**options)
    assert torch.equal(weights(resumed.run()), expected)
    assert resumed.progress == whole.progress
    assert (whole.progress.step, len(whole.progress.history)) == (15, 3)


@pytest.mark.parametrize("cached", [False, True])
def test_with_a_teacher_it_resumes_to_the_bit(bench: Bench, cached: bool):
    def teacher(folder: str) -> Teacher:
        return bench.teacher(cached=folder if cached else None)

    expected = bench.trained(teacher=teacher("whole"))
    with pytest.raises(StoppedError):
        bench.trainer(teacher=teacher("stopped")).run(on_step=stop_at(8))
    assert torch.equal(bench.trained(teacher=teacher("stopped")), expected)


def test_a_run_that_has_ended_is_not_trained_again(bench: Bench):
    trained = weights(bench.trainer().run())
    again = bench.trainer().run(on_step=stop_at(16))
    assert torch.equal(weights(again), trained)


@pytest.mark.parametrize("options", [{}, {"augmentation": MIXED}, {"patch_drop": 0.5}], ids=["plain", "mixed", "drop"])
def test_a_run_is_fixed_by_its_seed(bench: Bench, options: dict):
    first = bench.trained(seed=1, **options)
    torch.manual_seed(7)
    assert torch.equal(bench.trained(seed=1, **options), first)
    assert not torch.equal(bench.trained(seed=2, **options), first)


def test_alone_and_under_accelerate_one_process_trains_the_same(bench: Bench):
    assert torch.equal(bench.trained(), bench.trained(together=accelerator(CPU, "no")))


def test_the_ranks_of_a_step_depend_on_seed_and_step_alone(bench: Bench):
    def drawn(**options) -> list[dict[str, int]]:
        trainer, found = bench.trainer(state="drawn.pt", **options), []
        layers = elastic_layers(trainer.model)
        trainer.run(on_step=lambda step, loss: found.append({name: layer.rank for name, layer in layers.items()}))
        trainer.state_file.unlink()
        return found

    first = drawn()
    assert drawn(learning_rate=1e-5, accumulation=2, teacher=bench.teacher()) == first
    assert drawn(seed=1) != first
    allowed = {48 if rank == "dense" else rank for rank in RANKS}
    assert {rank for ranks in first for rank in ranks.values()} == allowed


DRIFT = {
    "AdamW": {"optimizer": "adamw", "weight_decay": 0.5},
    "SGD with momentum": {"optimizer": "sgd", "weight_decay": 0.5, "learning_rate": 1e-2},
    "accumulation": {"weight_decay": 0.5, "accumulation": 4},
    "no clipping": {"weight_decay": 0.5, "clip_grad": None},
    "bf16": {"weight_decay": 0.5, "precision": "bf16"},
    "mixed and averaged": {"weight_decay": 0.5, "augmentation": MIXED, "ema_decay": 0.5},
}


@pytest.mark.parametrize("options", DRIFT.values(), ids=DRIFT)
def test_a_step_does_not_move_what_lies_above_its_ranks(bench: Bench, options: dict):
    """Steps at higher ranks have left moments behind, with which the optimizer would go on."""
    trainer = bench.trainer(**options)
    layers, before = elastic_layers(trainer.model), components(trainer.model)
    unmoved: list[int] = []

    def compare(step: int, loss: float) -> None:
        after = components(trainer.model)
        for name, layer in layers.items():
            unmoved.append(layer.full_rank - layer.rank)
            for old, new in zip(before[name], after[name], strict=True):
                assert torch.equal(new[layer.rank :], old[layer.rank :]), (step, name)
                assert (new[: layer.rank] != old[: layer.rank]).reshape(layer.rank, -1).any(1).all(), (step, name)
        before.update(after)

    trainer.run(on_step=compare)
    assert unmoved.count(0) > 5
    assert len(unmoved) - unmoved.count(0) > 5


@pytest.mark.parametrize("options", [{}, {"sandwich": 1}, {"sandwich": 2, "accumulation": 2}, {"optimizer": "sgd"}])
def test_weights_above_the_largest_rank_of_a_run_do_not_move_at_all(bench: Bench, options: dict):
    trainer = bench.trainer(ranks=(6, 12, 24), weight_decay=0.5, **options)
    before = components(trainer.model)
    after = components(trainer.run())
    for name in before:
        for old, new in zip(before[name], after[name], strict=True):
            assert torch.equal(new[24:], old[24:])
            assert not torch.equal(new[:6], old[:6])


def test_a_sandwich_trains_the_largest_and_the_smallest_in_each_step(bench: Bench):
    trainer = bench.trainer(sandwich=1, epochs=1)
    layer, seen = next(iter(elastic_layers(trainer.model).values())), []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(module.rank))
    before = components(trainer.model)
    trainer.run()
    assert len(seen) == 3 * STEPS_PER_EPOCH
    assert set(seen[::3]) == {48}
    assert set(seen[1::3]) == {6}
    for name, parts in components(trainer.model).items():
        for old, new in zip(before[name], parts, strict=True):
            assert (new != old).reshape(48, -1).any(1).all()


def test_a_sandwich_of_equal_subnets_trains_as_one_of_them(bench: Bench):
    plain = {"optimizer": "sgd", "learning_rate": 1e-2, "clip_grad": None, "ranks": (12,)}
    start, one = weights(bench.factorized), bench.trained(**plain)
    several = bench.trained(sandwich=2, **plain)
    assert (several - one).abs().max() < 1e-4 * (one - start).abs().max()


@pytest.mark.parametrize("augmentation", [STILL, AUGMENTATIONS["light"]], ids=["still", "light"])
def test_an_epoch_has_every_image_once_in_an_order_and_with_crops_of_its_own(marked: Bench, augmentation: Augmentation):
    trainer, seen = marked.trainer(tiny_model(), augmentation=augmentation, epochs=2), []
    trainer.model.register_forward_pre_hook(lambda module, inputs: seen.extend(i.numpy().tobytes() for i in inputs[0]))
    trainer.run()
    first, second = seen[:20], seen[20:]
    assert len(set(first)) == len(set(second)) == 20
    assert first != second
    assert (set(first) == set(second)) == (augmentation is STILL)


@pytest.mark.parametrize("options", [{}, {"sandwich": 1}, {"clip_grad": 0.1}], ids=["plain", "sandwich", "clipped"])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_passes_equal_one_larger_pass(bench: Bench, options: dict, accumulation: int):
    plain = {"optimizer": "sgd", "learning_rate": 1e-2} | options
    start, one = weights(bench.factorized), bench.trained(**plain)
    several = bench.trained(accumulation=accumulation, **plain)
    assert (several - one).abs().max() < 1e-4 * (one - start).abs().max()


@pytest.mark.parametrize("task_weight", [0.0, 0.4])
def test_a_cache_of_all_classes_trains_as_the_teacher_itself_does(bench: Bench, task_weight: float):
    plain = {"optimizer": "sgd", "learning_rate": 1e-2, "task_weight": task_weight}
    start = weights(bench.factorized)
    online = bench.trained(teacher=bench.teacher(), **plain) - start
    kept = bench.trained(teacher=bench.teacher(cached="all"), **plain) - start
    few = bench.trained(teacher=bench.teacher(cached="few", top_k=2), **plain) - start
    without = bench.trained(**plain) - start
    assert (kept - online).norm() < 1e-3 * online.norm()
    assert (few - online).norm() > 1e-2 * online.norm()
    assert (without - online).norm() > 0.1 * online.norm()


def test_a_filled_cache_is_read_without_the_teacher_and_trains_the_same(bench: Bench):
    filling = bench.trained(teacher=bench.teacher(cached="kept"))
    reading = bench.teacher(cached="kept")
    reading.module.register_forward_pre_hook(lambda module, inputs: pytest.fail("the teacher was asked again"))
    assert torch.equal(bench.trained(teacher=reading), filling)


def test_the_teacher_is_not_trained(bench: Bench):
    teacher = bench.teacher()
    before = weights(teacher.module).clone()
    bench.trained(teacher=teacher)
    assert torch.equal(weights(teacher.module), before)


def test_a_loss_that_is_no_number_stops_with_step_epoch_and_the_kept_state(bench: Bench):
    trainer, kept = bench.trainer(), []

    def poison(step: int, loss: float) -> None:
        if step == 7:
            kept.append(trainer.state_file.read_bytes())
            next(trainer.model.parameters()).data.fill_(float("nan"))

    where = re.escape(str(trainer.state_file))
    with pytest.raises(FloraError, match=rf"loss is nan in step 8 \(epoch 2\); the state after epoch 1 .* {where}"):
        trainer.run(on_step=poison)
    assert trainer.state_file.read_bytes() == kept[0]
    resumed = bench.trainer()
    trained = weights(resumed.run())
    assert torch.equal(trained, bench.trained(state="whole.pt"))


def test_a_loss_that_is_no_number_in_the_first_epoch_leaves_no_state(bench: Bench):
    trainer = bench.trainer(learning_rate=1e20, schedule="constant", clip_grad=None)
    with pytest.raises(FloraError, match=r"loss is (nan|inf) in step 2 \(epoch 1\); no epoch was finished. Lower --lr"):
        trainer.run()
    assert not trainer.state_file.exists()


@pytest.mark.parametrize("content", ["other", "text", "nothing", "half", "list", "no step"])
def test_a_state_that_cannot_be_used_is_refused_by_its_file(bench: Bench, content: str):
    trainer = bench.trainer(epochs=1)
    trainer.run()
    file, state = trainer.state_file, torch.load(trainer.state_file, weights_only=True)
    if content == "other":
        bench.trainer(tiny_model("swin"), state="other.pt", epochs=1).run()
        (bench.folder / "other.pt").replace(file)
    elif content in ("list", "no step"):
        torch.save([1] if content == "list" else {k: v for k, v in state.items() if k != "step"}, file)
    else:
        whole = file.read_bytes()
        file.write_bytes({"text": b"no state", "nothing": b"", "half": whole[: len(whole) // 2]}[content])
    with pytest.raises(InputError, match=rf"{file.name} cannot be used \(.*--restart"):
        bench.trainer(epochs=1).run()


def test_fewer_images_than_one_batch_are_refused(bench: Bench):
    with pytest.raises(InputError, match="has 20 images, fewer than one batch of 21"):
        bench.trainer(batch_size=21)


def test_images_that_fill_no_batch_are_left_out_of_an_epoch(bench: Bench):
    assert bench.trainer(batch_size=20).steps_per_epoch == 1
    assert bench.trainer(batch_size=9).steps_per_epoch == 2


def test_a_batch_that_does_not_divide_is_refused(bench: Bench):
    with pytest.raises(InputError, match="batch of 6 images does not divide into 1 processes times 4"):
        bench.trainer(batch_size=6, accumulation=4)


def test_the_moving_average_is_what_is_returned(bench: Bench):
    trainer = bench.trainer(ema_decay=0.8)
    history: list[Tensor] = []
    module = trainer.run(on_step=lambda step, loss: history.append(weights(trainer.model)))
    average = history[1]
    for current in history[2:]:
        average = 0.8 * average + 0.2 * current
    torch.testing.assert_close(weights(module), average, atol=1e-6, rtol=1e-5)
    assert (weights(module) - weights(trainer.model)).abs().max() > 1e-4


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_what_is_returned_is_at_its_largest_ranks_and_ready_to_be_used(bench: Bench, ema_decay: float | None):
    for ranks, largest in ((RANKS, 48), ((6, 12, 24), 24)):
        module = bench.trainer(state=f"{largest}.pt", ranks=ranks, ema_decay=ema_decay).run()
        assert {layer.rank for layer in elastic_layers(module).values()} == {largest}
        assert not module.training


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_patches_are_dropped_while_training_and_never_after(bench: Bench, ema_decay: float | None):
    trainer, tokens = bench.trainer(patch_drop=0.5, ema_decay=ema_decay), []
    trainer.model.blocks[0].register_forward_pre_hook(lambda block, inputs: tokens.append(inputs[0].shape[1]))
    module = trainer.run()
    assert set(tokens) == {1 + 49 // 2}
    for model in (module, trainer.model):
        assert type(model.patch_drop) is nn.Identity
    module.blocks[0].register_forward_pre_hook(lambda block, inputs: tokens.append(inputs[0].shape[1]))
    module.train()(random_images(2))
    assert tokens[-1] == 1 + 49


def test_a_swin_cannot_drop_patches(bench: Bench):
    with pytest.raises(InputError, match=r"SwinTransformer cannot leave out patches.*--patch-drop"):
        bench.trainer(tiny_model("swin"), patch_drop=0.5)


def test_mixed_images_have_no_answers_in_a_cache(bench: Bench):
    with pytest.raises(InputError, match="no cache holds answers for; leave out --teacher-cache"):
        bench.trainer(augmentation=MIXED, teacher=bench.teacher(cached="kept"))


def test_kept_answers_have_one_temperature(bench: Bench):
    with pytest.raises(InputError, match="leave out --temperature"):
        bench.trainer(temperature=2.0, teacher=bench.teacher(cached="kept"))


def test_an_odd_pass_cannot_be_mixed(bench: Bench):
    with pytest.raises(InputError, match="mix images in pairs, and a process gets 5"):
        bench.trainer(augmentation=MIXED, batch_size=10, accumulation=2)


def test_a_label_beyond_the_classes_is_refused_with_both_numbers(bench: Bench):
    model = tiny_model()
    model.reset_classifier(7)
    with pytest.raises(InputError, match=r"a label [789], the model has 7 classes"):
        bench.trainer(model).run()


@pytest.mark.parametrize("what", ["optimizer", "schedule"])
def test_an_unknown_optimizer_or_schedule_is_refused_by_name(bench: Bench, what: str):
    with pytest.raises(InputError, match=f"The {what} 'cosinus' cannot be used"):
        bench.trainer(**{what: "cosinus"})


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_the_loss_of_a_plain_model_falls(marked: Bench, family: str):
    trainer = marked.trainer(tiny_model(family), augmentation=STILL, epochs=20, label_smoothing=0.0)
    trainer.run()
    losses = [figures["loss"] for figures in trainer.progress.history]
    assert losses[-1] < 0.4 * losses[0]


@pytest.mark.parametrize("options", [{}, {"sandwich": 1}], ids=["drawn", "sandwich"])
def test_the_loss_of_every_subnet_falls(marked: Bench, options: dict):
    supernet, space = copy.deepcopy(marked.factorized), marked.space()
    configs = [space.smallest(), dict.fromkeys(space.choices, 12), space.largest()]

    def losses() -> list[float]:
        found = []
        for ranks in configs:
            with active_ranks(supernet, ranks):
                found.append(evaluate(supernet, marked.images.loader(20)).loss)
        return found

    before = losses()
    marked.trainer(supernet=supernet, augmentation=STILL, epochs=20, **options).run()
    assert all(now < 0.95 * then for now, then in zip(losses(), before, strict=True))


def test_with_all_images_in_a_batch_it_is_descent_on_their_mean_loss(marked: Bench):
    """A loop of torch alone: SGD with Nesterov's momentum, the rate a cosine, the gradient clipped."""
    plain = {"optimizer": "sgd", "learning_rate": 1e-2, "min_learning_rate": 1e-4, "weight_decay": 0.0}
    images, labels = next(iter(marked.images.loader(20)))
    model = tiny_model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * step / 6)) / 2
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    options = {"augmentation": STILL, "batch_size": 20, "epochs": 6, "clip_grad": 0.5}
    trained, start = marked.trained(tiny_model(), **options, **plain), weights(tiny_model())
    assert (trained - weights(model)).abs().max() < 1e-4 * (trained - start).abs().max()


def test_distillation_brings_the_student_near_its_teacher(bench: Bench):
    student, teacher = copy.deepcopy(bench.factorized), bench.teacher()

    @torch.no_grad()
    def distance() -> float:
        set_ranks(student, bench.cost.dense_ranks)
        images = torch.cat([images for images, _ in bench.images.loader(20)])
        return nn.functional.kl_div(
            student.eval()(images).log_softmax(1), teacher.module(images).softmax(1), reduction="batchmean"
        ).item()

    before = distance()
    trainer = bench.trainer(student, augmentation=STILL, epochs=12, learning_rate=2e-3, teacher=teacher)
    trainer.run()
    assert distance() < 0.3 * before


def test_the_history_holds_each_epochs_mean_loss_and_the_figures_given(bench: Bench):
    trainer, losses, seen = bench.trainer(ema_decay=0.5), [], []

    def figures(module: nn.Module) -> dict:
        seen.append(module)
        return {"top1": 10.0 * len(seen)}

    module = trainer.run(on_step=lambda step, loss: losses.append(loss), at_epoch_end=figures)
    assert seen == [module] * 3
    for epoch, line in enumerate(trainer.progress.history):
        mean = sum(losses[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH]) / STEPS_PER_EPOCH
        assert line == {"epoch": epoch + 1, "loss": pytest.approx(mean, abs=1e-5), "top1": 10.0 * (epoch + 1)}


def test_the_rate_rises_and_falls_step_by_step_as_a_cosine_with_the_warm_up_inside(bench: Bench):
    options = {"min_learning_rate": 1e-5, "warmup_learning_rate": 1e-6, "warmup_epochs": 1, "accumulation": 2}
    trainer, rates = bench.trainer(**options), []
    trainer.run(on_step=lambda step, loss: rates.append([g["lr"] for g in trainer.optimizer.param_groups]))
    warm_up = [1e-6 + step / 5 * (1e-3 - 1e-6) for step in range(5)]
    cosine = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * step / 15)) / 2 for step in range(5, 15)]
    assert rates == [[pytest.approx(rate)] * 2 for rate in warm_up + cosine]


def test_without_a_schedule_the_rate_stands_still(bench: Bench):
    trainer, rates = bench.trainer(schedule="none"), []
    trainer.run(on_step=lambda step, loss: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    assert rates == [1e-3] * 15


def test_the_gradient_of_a_step_is_clipped_to_the_norm_given(bench: Bench):
    """Nesterov's first step is 1.9 times the gradient."""
    plain = {"optimizer": "sgd", "epochs": 1, "batch_size": 20, "weight_decay": 0.0, "learning_rate": 1.0}
    start = weights(bench.factorized)
    moved = {clip: (bench.trained(clip_grad=clip, **plain) - start).norm().item() for clip in (0.01, 0.02, None)}
    assert moved[0.01] == pytest.approx(0.019, rel=1e-3)
    assert moved[0.02] == pytest.approx(0.038, rel=1e-3)
    assert moved[None] > 0.1


def test_clipping_counts_the_accumulated_passes_together(bench: Bench):
    plain = {"optimizer": "sgd", "epochs": 1, "batch_size": 20, "weight_decay": 0.0, "learning_rate": 1.0}
    moved = bench.trained(clip_grad=0.01, accumulation=5, **plain) - weights(bench.factorized)
    assert moved.norm().item() == pytest.approx(0.019, rel=1e-3)


def test_weight_decay_is_for_matrices_alone(bench: Bench):
    """AdamW's first step differs by rate times decay times weight where there is decay, and nowhere else."""
    one_step = {"epochs": 1, "batch_size": 20, "ranks": ("dense",)}
    start = dict(bench.factorized.named_parameters())
    free, decayed = (
        dict(bench.trainer(state=f"{d}.pt", weight_decay=d, **one_step).run().named_parameters()) for d in (0.0, 0.5)
    )
    for name, weight in start.items():
        decays = weight.ndim > 1 and name not in ("pos_embed", "cls_token")
        expected = -1e-3 * 0.5 * weight if decays else torch.zeros_like(weight)
        torch.testing.assert_close(decayed[name] - free[name], expected, atol=3e-7, rtol=1e-3)


def test_adamw_has_the_papers_moments(bench: Bench):
    for group in bench.trainer().optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)


def test_mixed_precision_trains_nearly_the_same_and_keeps_full_weights(bench: Bench):
    plain = {"optimizer": "sgd", "learning_rate": 1e-2}
    start, full = weights(bench.factorized), bench.trained(**plain)
    mixed = bench.trained(precision="bf16", **plain)
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - full).norm() < 0.2 * (full - start).norm()


def test_fp16_needs_a_gpu():
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        accelerator(CPU, "fp16")
    with pytest.raises(InputError, match="full precision or bf16"):
        Alone(CPU, "fp16")
