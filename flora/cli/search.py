"""`flora search`."""

from pathlib import Path

import click

from flora.cli.options import (
    IMAGES_HELP,
    batch_size_option,
    device_option,
    fitness_option,
    generations_option,
    json_option,
    out_option,
    population_option,
    restart_option,
    set_threads,
    threads_option,
    torch_device,
    workers_option,
)
from flora.ranks.budget import asks_for_latency
from flora.ranks.evolution import SearchSettings


@click.command("search")
@click.argument("supernet", type=click.Path(path_type=Path))
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    required=True,
    metavar="BUDGET",
    help="macs=50% of the whole dense model, macs=2.7G, or params=12M; with --latency-table also latency=0.6x or "
    "latency=12ms, at batch 8 or, with @b1, at another (repeatable).",
)
@click.option(
    "--latency-table",
    type=click.Path(path_type=Path),
    help="Table of flora latency-table, by which budgets of latency go.",
)
@click.option("--select-data", metavar="IMAGES", required=True, help=f"Images to choose by: {IMAGES_HELP}.")
@out_option("result")
@fitness_option
@population_option
@click.option(
    "--parents", type=int, help="Best configs that a generation comes from (default: a fifth of the population)."
)
@click.option("--mutants", type=int, help="Mutated parents in a generation (default: half of the population).")
@click.option("--crossovers", type=int, help="Children of two in a generation (default: half of the population).")
@generations_option
@click.option(
    "--mutation-probability",
    type=float,
    default=SearchSettings.mutation_probability,
    show_default=True,
    help="For each block.",
)
@click.option(
    "--window",
    type=float,
    default=SearchSettings.window,
    show_default=True,
    help="Part of the budget to search below it.",
)
@click.option(
    "--halving/--no-halving",
    default=SearchSettings.halving,
    show_default=True,
    help="Stop clearly worse configs early.",
)
@click.option("--seed", type=int, default=SearchSettings.seed, show_default=True, help="Seed of everything drawn.")
@batch_size_option(250)
@workers_option
@device_option
@threads_option
@restart_option
@json_option
def command(
    supernet: Path,
    budgets: tuple[str, ...],
    latency_table: Path | None,
    select_data: str,
    out: Path,
    fitness: str,
    population: int,
    parents: int | None,
    mutants: int | None,
    crossovers: int | None,
    generations: int,
    mutation_probability: float,
    window: float,
    halving: bool,
    seed: int,
    batch_size: int,
    workers: int,
    device: str,
    threads: int | None,
    restart: bool,
    as_json: bool,
) -> None:
    """Find the best ranks of SUPERNET within one or several budgets, by evolution.

    Writes the ranks for each budget, the Pareto set of all that was evaluated, the history and figures. Stopped, the
    same command goes on from the last finished generation; finished, it does nothing. Under torchrun the candidates
    are spread over the processes, with the same result.
    """
    if latency_table is None and (timed := [text for text in budgets if asks_for_latency(text)]):
        raise click.UsageError(f"--budget {timed[0]} needs --latency-table FILE: flora latency-table MODEL -o FILE.")
    set_threads(threads)
    from flora.cli.output import millions, print_json, print_next, print_table, progress, say_when_done
    from flora.lowrank.checkpoint import load_supernet
    from flora.pipeline.search import SearchRequest, plan_search, search
    from flora.training.processes import is_main, processes

    where = torch_device(device)
    processes(where)
    request = SearchRequest(
        select_data=select_data,
        budgets=budgets,
        latency_table=latency_table,
        fitness=fitness,  # type: ignore[arg-type]
        settings=SearchSettings.of_size(
            population,
            generations,
            parents=parents,
            mutants=mutants,
            crossovers=crossovers,
            mutation_probability=mutation_probability,
            window=window,
            seed=seed,
            halving=halving,
        ),
        device=where,
        batch_size=batch_size,
        workers=workers,
        restart=restart,
    )
    loaded = load_supernet(supernet)
    plan = plan_search(loaded, budgets, latency_table)
    cost = plan.cost
    if is_main() and not as_json:
        print_table(
            [
                *("subnet", "MACs", "of dense", "parameters", "of dense"),
                *(f"predicted, ms at batch {batch}" for batch in plan.latencies),
            ],
            [
                [
                    name,
                    millions(cost.macs(ranks)),
                    f"{cost.macs(ranks) / cost.dense_macs:.1%}",
                    millions(cost.params(ranks)),
                    f"{cost.params(ranks) / cost.dense_params:.1%}",
                    *(f"{latency.ms(ranks):.3g}" for latency in plan.latencies.values()),
                ]
                for name, ranks in plan.subnets.items()
            ],
            title=f"Within reach, and so {'is' if len(budgets) == 1 else 'are'} {', '.join(budgets)}",
        )
    total = len(budgets) * (generations + 1)
    with progress("searching", total, hidden=as_json or not is_main()) as advance:
        outcome = search(
            *(supernet, out, request),
            on_start=say_when_done(out, hidden=not is_main()),
            on_generation=lambda state: advance(what=f"{state.budget}, generation {state.generation} of {generations}"),
        )
    if not is_main():
        return
    if as_json:
        print_json(
            {
                "folder": str(out),
                "image_forwards": outcome.image_forwards,
                "budgets": {
                    text: {
                        "file": outcome.files[text],
                        "macs": config.macs,
                        "params": config.params,
                        "latency_ms": config.latency_ms,
                        "score": config.score,
                    }
                    for text, config in outcome.configs.items()
                },
            }
        )
        return
    print_table(
        [
            *("budget", "MACs", "of dense", "parameters"),
            *(["predicted, ms"] if plan.latencies else []),
            *(f"score ({fitness})", "file"),
        ],
        [
            [
                text,
                millions(config.macs),
                f"{(config.macs or 0) / cost.dense_macs:.1%}",
                millions(config.params),
                *([f"{config.latency_ms:.3g}" if config.latency_ms else "-"] if plan.latencies else []),
                f"{config.score:.5g}",
                outcome.files[text],
            ]
            for text, config in outcome.configs.items()
        ],
    )
    first = next(iter(outcome.files.values()))
    print_next(f"the search {out}", f"flora materialize {supernet} --ranks {out}/{first} -o {out}-compact")
