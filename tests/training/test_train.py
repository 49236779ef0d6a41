"""Training resumes to the bit, moves what a step has used and nothing else, and stops where it cannot go on."""

import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from flora.errors import FloraError, InputError
from flora.lowrank.supernet import elastic_layers
from flora.training.alone import Alone
from flora.training.processes import accelerator
from flora.training.train import Teacher, Trainer
from tests.samples import tiny_model
from tests.training.bench import CPU, MIXED, RANKS, STEPS_PER_EPOCH, Bench, StoppedError, components, stop_at, weights

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


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_after_a_loss_that_is_no_number_the_run_goes_on_with_a_lower_rate(bench: Bench, schedule: str):
    def rates(trainer: Trainer, *, poisoned: int | None = None) -> dict[int, float]:
        found = {}

        def note(step: int, loss: float) -> None:
            found[step] = trainer.optimizer.param_groups[0]["lr"]
            if step == poisoned:
                next(trainer.model.parameters()).data.fill_(float("nan"))

        with pytest.raises(FloraError, match=r"--lr.*same command goes on") if poisoned else nullcontext():
            trainer.run(on_step=note)
        return found

    lower = {"learning_rate": 1e-4, "clip_grad": 1.0, "schedule": schedule}
    expected = rates(bench.trainer(state="lower.pt", **lower))
    rates(bench.trainer(schedule=schedule), poisoned=7)
    resumed = bench.trainer(**lower)
    assert rates(resumed) == {step: expected[step] for step in range(6, 16)}
    assert resumed.progress.changes == [{"until_epoch": 1, "learning_rate": 1e-3, "clip_grad": 5.0}]
    assert [line["epoch"] for line in resumed.progress.history] == [1, 2, 3]


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


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_judgement_that_fails_costs_no_epoch(bench: Bench, epoch: int):
    judged: list[int] = []

    def judge(module: nn.Module) -> dict:
        judged.append(len(judged) + 1)
        return {"weights": weights(module).sum().item()}

    def fail(module: nn.Module) -> dict:
        if len(judged) == epoch - 1:
            raise StoppedError
        return judge(module)

    whole = bench.trainer(state="whole.pt", ema_decay=0.5)
    expected = weights(whole.run(at_epoch_end=judge))
    judged.clear()
    with pytest.raises(StoppedError):
        bench.trainer(ema_decay=0.5).run(at_epoch_end=fail)
    resumed, steps = bench.trainer(ema_decay=0.5), []
    trained = resumed.run(at_epoch_end=judge, on_step=lambda step, loss: steps.append(step))
    assert steps == list(range(epoch * STEPS_PER_EPOCH + 1, 16))
    assert torch.equal(weights(trained), expected)
    assert resumed.progress == whole.progress


def test_each_epoch_is_told_once_with_its_line_of_the_history_and_its_seconds(bench: Bench):
    told: list[dict] = []
    with pytest.raises(StoppedError):
        bench.trainer().run(on_step=stop_at(8), on_epoch=told.append)
    resumed = bench.trainer()
    resumed.run(at_epoch_end=lambda module: {"top1": 5.0}, on_epoch=told.append)
    assert all(figures.pop("seconds") > 0 for figures in told)
    assert told == resumed.progress.history
    assert [figures["epoch"] for figures in told] == [1, 2, 3]


def test_fp16_needs_a_gpu():
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        accelerator(CPU, "fp16")
    with pytest.raises(InputError, match="full precision or bf16"):
        Alone(CPU, "fp16")
