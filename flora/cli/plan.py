"""The plans of `flora compress --dry-run` as tables."""

from collections.abc import Mapping
from dataclasses import asdict

from flora.cli.output import millions, print_json, print_table
from flora.pipeline.plan import Plan


def print_plans(plans: Mapping[str, Plan], *, as_json: bool) -> None:
    """One plan for each budget: what is within reach, and the steps with their time."""
    if as_json:
        print_json({budget: asdict(plan) | {"seconds": plan.seconds} for budget, plan in plans.items()})
        return
    for budget, plan in plans.items():
        dense_macs, dense_params = plan.reach["dense"]
        print_table(
            ["within reach", "MACs", "of dense", "parameters", "of dense"],
            [
                [name, millions(macs), f"{macs / dense_macs:.1%}", millions(params), f"{params / dense_params:.1%}"]
                for name, (macs, params) in plan.reach.items()
            ],
            title=budget,
        )
        print_table(
            ["step", "images", "about"],
            [
                [step.what, "-" if step.images is None else f"{step.images:,}", f"{step.seconds / 60:.1f} min"]
                for step in plan.steps
            ],
            title=f"{budget}: about {plan.seconds / 60:.1f} minutes, reading images not counted",
        )
        for note in plan.notes:
            print(f"Note: {note}")
    if len(plans) > 1:
        print("What does not depend on the budget is done once for all: factorizing, probing, the trained supernet.")
    print("Nothing was written. Leave out --dry-run to begin.")
