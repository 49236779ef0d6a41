"""Training descends on the loss that it should, at the rate that it should, and its teacher is what it learns."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from flora.lowrank.supernet import active_ranks, elastic_layers, set_ranks
from flora.training.evaluate import evaluate
from flora.training.settings import AUGMENTATIONS, Augmentation
from tests.samples import random_images, tiny_model
from tests.training.bench import RANKS, STILL, Bench, weights


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
