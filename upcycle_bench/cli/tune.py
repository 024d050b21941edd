"""`upcycle-bench tune`: choose a strategy's options by the protocol's rule, and run its one tuned row."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upcycle_bench.cli.common import (
    Checkpoint,
    Data,
    EvalData,
    Interpolate,
    Json,
    Overrides,
    PixelSettings,
    ProtocolName,
    StopAfter,
    going_on,
    is_main,
    key_value,
    open_registry,
    resumable,
    stop_time,
    terminal_reporter,
    uncollected,
    warn_emulated,
    written_out,
)
from upcycle_bench.cli.jobs import Jobs, chosen_jobs, jobs_of
from upcycle_bench.cli.live import live_table
from upcycle_bench.cli.run import OF_A_MATRIX, show_matrix, show_outcomes, show_preview
from upcycle_bench.cli.tables import table
from upcycle_bench.util.errors import UserError

if TYPE_CHECKING:
    from upcycle_bench.record import TunedPart
    from upcycle_bench.tune import Task

Strategy = Annotated[str, typer.Option("--strategy", "-s", help="Which strategy; see `list strategies`.")]
Tries = Annotated[
    list[str] | None,
    typer.Option("--try", metavar="KEY=VALUE,...", help="Options of one candidate; the defaults are one anyway."),
]


def tune(
    context: typer.Context,
    strategy: Strategy,
    tries: Tries = None,
    protocol: ProtocolName = "lab",
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(min=0, help="Both seeds of the tuned row.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from --seed on.")] = 1,
    init_seed: Annotated[int | None, typer.Option(min=0, help="The strategy's own randomness.")] = None,
    train_seed: Annotated[int | None, typer.Option(min=0, help="Data order, augmentation, dropout.")] = None,
    jobs: Jobs = "1",
    results: Annotated[Path, typer.Option(help="Where the records go.")] = Path("results"),
    data: Data = None,
    checkpoint: Checkpoint = None,
    pixels: PixelSettings = None,
    interpolate: Interpolate = False,
    eval_data: EvalData = None,
    stop_after: StopAfter = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the candidates cost.")] = False,
    as_json: Json = False,
) -> None:
    """Choose a strategy's options on the tuning sets by the protocol's rule, and run its one tuned row."""
    with uncollected():
        from upcycle_bench import tune as tuning
        from upcycle_bench.model.pixels import parsed
        from upcycle_bench.model.pretrained import Choices
        from upcycle_bench.planning.matrix import seed_pairs
        from upcycle_bench.planning.plan import Paths
        from upcycle_bench.planning.tuning import refuse_tuning_seeds
        from upcycle_bench.protocol import load_protocol

    pairs, registry = seed_pairs(seed, seeds, init_seed, train_seed), open_registry()
    at_once = jobs_of(jobs)
    if at_once != 1 and "RANK" in os.environ:
        raise UserError("--jobs starts processes of its own and does not go with torchrun; leave one of them out.")
    registry.get("strategy", strategy)
    settings = load_protocol(registry.get("protocol", protocol).target, overrides)
    if settings.tuning is not None:
        refuse_tuning_seeds(settings.tuning, pairs)
    choices = Choices(parsed(pixels or []), interpolate)
    paths = Paths(data=data, checkpoint=checkpoint, eval_data=eval_data, choices=choices)
    reporter, until = terminal_reporter(), stop_time(stop_after)
    with resumable("nothing half-built was left; the same command builds the data", until):
        task = tuning.tuning(registry, strategy, settings, [options_of(text) for text in tries or []], paths, reporter)
    if dry_run:
        show_dry_run(task, len(pairs), results, as_json)
        return
    warn_emulated(settings)
    shared = written_out(context, without=OF_A_MATRIX | {"protocol", "overrides", "tries"})
    tried = [part for text in tries or [] for part in ("--try", text)]
    at_once = at_once or chosen_jobs(task.cells, results)
    how: Any = {"jobs": at_once, "shared": shared, "tried": tried, "show": show_matrix, "live": live_table(reporter)}
    with resumable(going_on(len(task.cells) + len(pairs), fresh=False), until):
        tuned, outcomes = tuning.tune(task, pairs, results, reporter, **how)
    if is_main():
        if not as_json:
            show_choice(tuned)
        show_outcomes(outcomes, as_json, {"tuned": said(tuned)})
    if any(outcome.reason for outcome in outcomes):
        raise typer.Exit(1)


def options_of(text: str) -> dict[str, str]:
    """The options of one candidate, a=1,b=2; a value may hold commas. UserError for one that is given twice."""
    pairs = [key_value(part, "--try") for part in re.split(r",(?=[A-Za-z_]\w*=)", text)]
    options = dict(pairs)
    if len(options) < len(pairs):
        raise UserError(f"--try {text}: an option stands twice; each --try is one configuration.")
    return options


def said(tuned: TunedPart) -> dict[str, Any]:
    """The choice as a record has it, with the winner and the sums."""
    sums = {"winner": tuned.winner.label, "flops": tuned.flops, "seconds": tuned.seconds}
    return {**sums, **tuned.model_dump(mode="json")}


def show_choice(tuned: TunedPart) -> None:
    """A row for each candidate, then which one was chosen, and what that cost."""
    better = "higher" if tuned.higher_is_better else "lower"
    rows = [
        {
            "candidate": each.label,
            f"mean {tuned.headline}": f"{each.mean:.4f}",
            **{f"seed {run.seed}": f"{run.value:.4f}" for run in each.runs},
            "chosen": "yes" if each is tuned.winner else "",
        }
        for each in tuned.candidates
    ]
    table(f"tuned on {tuned.protocol}: {tuned.rule}, {better} is better", rows)
    flops = "FLOPs that were not counted" if tuned.flops is None else f"{tuned.flops:.2e} FLOPs"
    cost = f"{flops} and {tuned.seconds:,.1f} s"
    print(f"chosen: {tuned.winner.label}; the tuning cost {cost}, charged to the tuned row\n")


def show_dry_run(task: Task, reported: int, results: Path, as_json: bool) -> None:
    """The tuning runs, which of them are done, and what the others cost; then what would be reported."""
    from upcycle_bench.planning import plans
    from upcycle_bench.planning.matrix import preview

    if is_main():
        done = preview(task.cells, results, fresh=False)
        facts = {"rule": f"{task.table.rule} of {task.table.headline}", **plans.dry_run_of_matrix(task.cells, done)}
        facts["then"] = f"{reported} of the chosen one under {task.protocol.name}"
        show_preview(task.cells, done, facts, as_json)
