"""What one training step of a supernet costs beside one of the dense model: DeiT-S, batch 32, pairs in turn."""

import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay

from flora.lowrank.supernet import build_supernet, elastic_layers, set_ranks
from flora.lowrank.targets import find_targets, trace_cost
from flora.ranks.sampling import Sampler
from flora.ranks.space import space_from_text
from flora.training.segments import RankSegments

BATCH = 32
PAIRS = 12
MEMORY_STEPS = 4


def step_cost_arm() -> dict[str, Any]:
    """Seconds of a supernet step over those of the dense step after it, and the ratio of the peak memories."""
    cost, dense_step, supernet_step = _steps()
    ratios = []
    for pair in range(PAIRS + 1):
        seconds = []
        for step in (supernet_step, dense_step):
            started = time.perf_counter()
            step(pair)
            seconds.append(time.perf_counter() - started)
        if pair:  # the first one allocates
            ratios.append(seconds[0] / seconds[1])
    memory = [_peak_mib(kind) for kind in ("supernet", "dense")]
    return {
        "expected_macs_share": cost,
        "ratios": ratios,
        # Ranks differ from step to step: the sum over the same draws is what training takes.
        "time_ratio": statistics.fmean(ratios),
        "memory_mib": memory,
        "memory_ratio": memory[0] / memory[1],
    }


def _steps():
    images, labels = torch.randn(BATCH, 3, 224, 224), torch.randint(1000, (BATCH,))
    dense_step = _dense_step(images, labels)
    share, supernet_step = _supernet_step(images, labels)
    return share, dense_step, supernet_step


def _dense_step(images, labels):
    model = timm.create_model("deit_small_patch16_224").train()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-5, weight_decay=0.01)

    def step(number: int) -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()

    return step


def _supernet_step(images, labels):
    model = timm.create_model("deit_small_patch16_224").train()
    cost = trace_cost(model, find_targets(model), (3, 224, 224))
    build_supernet(model, cost, method="svd")
    space = space_from_text("deit-s", cost)
    sampler, segments = Sampler(space, cost), RankSegments(model, space.choices)
    groups = param_groups_weight_decay(model, 0.01)
    parameters = [group | {"params": segments.in_place_of(group["params"])} for group in groups]
    optimizer = create_optimizer_v2(parameters, "adamw", lr=1e-5, weight_decay=0.01)

    def step(number: int) -> None:
        set_ranks(model, sampler.sample(random.Random(number)))
        model.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        segments.take_gradients({name: layer.rank for name, layer in elastic_layers(model).items()})
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 5.0)
        optimizer.step()

    return sampler.expected_macs() / cost.dense_macs, step


def _peak_mib(kind: str) -> float:
    """Peak memory of a process that does some steps of one kind, less that of one that only imports."""
    code = (
        "import sys, torch; sys.path.insert(0, 'benchmarks'); from road import step_cost as s; "
        "i, l = torch.randn(s.BATCH, 3, 224, 224), torch.randint(1000, (s.BATCH,)); "
        "before = s._status_mib('VmRSS'); "
        f"step = s._dense_step(i, l) if {kind!r} == 'dense' else s._supernet_step(i, l)[1]; "
        "[step(n) for n in range(s.MEMORY_STEPS)]; "
        "print(s._status_mib('VmHWM') - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _status_mib(field: str) -> float:
    """A figure of this process from the kernel; getrusage's peak would be that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))
