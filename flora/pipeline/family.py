"""A family: one model at several budgets, from one supernet, and which of them are worth their time.

Its folder holds a bundle for each budget and `family.json`, which is written anew when a bundle is finished.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from export.bundle import Bundle
from flora.artifact import Document, check_replaceable
from flora.errors import InputError
from flora.pipeline.search import budget_slug
from flora.training.processes import is_main, wait

FAMILY = "family.json"


class FamilyMember(BaseModel):
    """One budget's factorized model as its bundle measured it: `top1` and `agreement` in percent, `latency_ratio` over
    the dense model on the same runtime. `bundle` is relative to the family's folder.

    `is_pareto`: neither the dense model nor another member that passed is at least as accurate and as fast, and better
    in one of the two.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget: str
    bundle: str
    precision: str
    macs: int
    params: int
    size_bytes: int
    top1: float | None
    agreement: float | None
    latency_ratio: float
    passed: bool
    is_pareto: bool = False


class Family(Document):
    """`family.json`: the members that are finished, in the order of the budgets."""

    kind: Literal["flora family"] = "flora family"
    model: str
    dense_top1: float | None = None
    budgets: tuple[str, ...]
    members: tuple[FamilyMember, ...] = ()


def budgets_of_family(text: str) -> tuple[str, ...]:
    """The budgets meant by `70%,50%,35%` (of the MACs) or `latency=0.8x,latency=0.6x`."""
    parts = [part.strip() for part in text.split(",")]
    budgets = tuple(part if "=" in part else f"macs={part}" for part in parts)
    if len(set(budgets)) < max(2, len(budgets)):
        raise InputError(f"{text!r} is no family; give two or more different budgets, such as 70%,50%,35%.")
    return budgets


def compress_family(
    model: str, budgets: Sequence[str], out: Path, compress: Callable[[str, Path], Bundle]
) -> tuple[Family, list[Bundle]]:
    """Write the bundle of each budget into the folder `out`, by `compress(budget, bundle folder)`.

    What `family.json` says of `model` grows with each bundle; stopped, the same call goes on.
    """
    check_replaceable(out, marker=FAMILY)
    file = out / FAMILY
    before = Family.load(file) if file.is_file() else Family(model=model, budgets=())
    known = {member.budget: member for member in before.members if before.model == model}
    bundles: list[Bundle] = []

    def saved(dense_top1: float | None) -> Family:
        members = [known[budget] for budget in budgets if budget in known]
        family = Family(
            model=model,
            dense_top1=dense_top1,
            budgets=tuple(budgets),
            members=tuple(_with_pareto(members, dense_top1)),
        )
        if is_main():
            family.save(file)
        wait()
        return family

    family = saved(before.dense_top1)
    for budget in budgets:
        bundles.append(compress(budget, out / budget_slug(budget)))
        known[budget] = _member(budget, bundles[-1])
        family = saved(_dense_top1(bundles[-1]))
    return family, bundles


def _dense_top1(bundle: Bundle) -> float | None:
    """Of the first stage, which is the dense model in torch."""
    return bundle.manifest.verification.stages[0].top1 if bundle.manifest.verification else None


def _member(budget: str, bundle: Bundle) -> FamilyMember:
    manifest = bundle.manifest
    candidates = [entry for entry in manifest.artifacts if entry.kind == "onnx" and entry.role == "candidate"]
    # What the budget gave: the file that is to be shipped, or where that is the dense one, the model in FP32.
    entry = next((one for one in candidates if one.name == manifest.recommended), candidates[0])
    assert manifest.verification is not None
    stage = next(stage for stage in manifest.verification.stages if stage.name.startswith(f"{entry.name},"))
    against_dense = [one for one in manifest.verification.stages if one.kind == "lowrank" and one.compared_with]
    own = [one for one in against_dense if one.name.startswith(f"{entry.name},")]
    lowrank = (own or against_dense)[0]
    return FamilyMember(
        budget=budget,
        bundle=bundle.folder.name,
        precision=entry.precision,
        macs=entry.macs or 0,
        params=entry.params or 0,
        size_bytes=entry.size_bytes,
        top1=stage.top1,
        agreement=None if lowrank.agreement is None else 100 * lowrank.agreement,
        latency_ratio=manifest.latency[entry.name].ratio,
        passed=manifest.verification.passed and not manifest.unmet,
    )


def _with_pareto(members: Sequence[FamilyMember], dense_top1: float | None) -> list[FamilyMember]:
    """The members, each told whether it is on the Pareto front of accuracy and speed."""

    def worth(member: FamilyMember) -> tuple[float, float]:
        accuracy = member.agreement if member.top1 is None else member.top1
        return (accuracy or 0.0, -member.latency_ratio)

    def is_beaten(own: tuple[float, float]) -> bool:
        return any(own != other and all(a >= b for a, b in zip(other, own, strict=True)) for other in rivals)

    dense = (100.0 if dense_top1 is None else dense_top1, -1.0)
    rivals = [dense, *(worth(member) for member in members if member.passed)]
    return [
        member.model_copy(update={"is_pareto": member.passed and not is_beaten(worth(member))}) for member in members
    ]
