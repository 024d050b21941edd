"""`upcycle-bench run`: one run, or the missing runs of a matrix; `--dry-run` says what they would cost."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upcycle_bench.cli.common import (
    Checkpoint,
    Data,
    EvalData,
    Interpolate,
    Json,
    LogEvery,
    Options,
    Overrides,
    PixelSettings,
    Prefetch,
    ProtocolName,
    StopAfter,
    Strategies,
    Suites,
    Track,
    Workers,
    going_on,
    is_main,
    resumable,
    stop_time,
    terminal_reporter,
    trackers_named,
    uncollected,
    warn_emulated,
    written_out,
)
from upcycle_bench.cli.evaluate import show_certificate
from upcycle_bench.cli.jobs import Jobs, chosen_jobs, jobs_of
from upcycle_bench.cli.live import live_table
from upcycle_bench.cli.plans import make_plans
from upcycle_bench.cli.tables import show_headlines, show_scores, show_skipped, table
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError

# Options of a matrix, which its runs do not get.
OF_A_MATRIX = {
    *("strategy", "option", "seed", "seeds", "init_seed", "train_seed"),
    *("jobs", "once", "stop_after", "as_json"),
}

if TYPE_CHECKING:
    from upcycle_bench.planning.matrix import Cell
    from upcycle_bench.planning.plan import Plan
    from upcycle_bench.record import Record
    from upcycle_bench.run_many import Outcome
    from upcycle_bench.util.progress import Reporter


def run(
    context: typer.Context,
    strategy: Strategies,
    protocol: ProtocolName = "lab",
    option: Options = None,
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(min=0, help="Both seeds.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from --seed on.")] = 1,
    init_seed: Annotated[int | None, typer.Option(min=0, help="The strategy's own randomness.")] = None,
    train_seed: Annotated[int | None, typer.Option(min=0, help="Data order, augmentation, dropout.")] = None,
    jobs: Jobs = "1",
    fresh: Annotated[bool, typer.Option("--fresh", help="Train again what was trained before.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Skip a single run, too, that --results shows as done.")] = False,
    results: Annotated[Path, typer.Option(help="Where the record goes.")] = Path("results"),
    data: Data = None,
    checkpoint: Checkpoint = None,
    pixels: PixelSettings = None,
    interpolate: Interpolate = False,
    eval_data: EvalData = None,
    suite: Suites = None,
    log_every: LogEvery = 1,
    track: Track = None,
    stop_after: StopAfter = None,
    workers: Workers = None,
    prefetch: Prefetch = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and what it costs.")] = False,
    as_json: Json = False,
) -> None:
    """Upcycle, train, score and record strategies under one protocol: one run, or what is missing of many."""
    with uncollected():
        from upcycle_bench.data.batches import Loading
        from upcycle_bench.planning import matrix

    at_once = jobs_of(jobs)
    pairs = matrix.seed_pairs(seed, seeds, init_seed, train_seed)
    if once and fresh:
        raise UserError("--once skips what was done before, and --fresh does it again; leave one of them out.")
    if at_once != 1 and "RANK" in os.environ:
        raise UserError("--jobs starts processes of its own and does not go with torchrun; leave one of them out.")
    reporter, trackers, until = terminal_reporter(log_every), trackers_named(track), stop_time(stop_after)
    dense = (checkpoint, pixels, interpolate)
    building = resumable("nothing half-built was left; the same command builds the data", until)
    plans = make_plans(strategy, protocol, option, overrides, data, *dense, eval_data, reporter, suite, building)
    cells = list(matrix.enumerate_cells(plans, pairs))
    if not plans[0].missing:
        warn_emulated(plans[0].protocol)
    if dry_run:
        _show_dry_run(cells, results, fresh, jobs, as_json)
        return
    if is_main():
        show_skipped(plans[0].skipped, stderr=True)  # before a training of days
    how = {"fresh": fresh, "track": trackers, "loading": Loading(workers, prefetch)}
    with resumable(going_on(len(cells), fresh), until):
        if len(cells) == 1 and not once:
            _run_one(cells[0].plan, results, reporter, how, as_json)
        else:
            shared = written_out(context, without=OF_A_MATRIX)
            if at_once is None:
                at_once = chosen_jobs(cells, results)
            _run_matrix(cells, results, reporter, at_once, how, shared, as_json)


def _run_matrix(
    cells: list[Cell], results: Path, reporter: Reporter, jobs: int, how: Any, shared: list[str], as_json: bool
) -> None:
    from upcycle_bench import run_many

    live = live_table(reporter)
    outcomes = run_many.run_all(cells, results, reporter, jobs=jobs, shared=shared, show=show_matrix, live=live, **how)
    if is_main():
        show_outcomes(outcomes, as_json)
    if failed := [outcome.status for outcome in outcomes if outcome.reason]:
        raise typer.Exit(failed[0] if len(outcomes) == 1 else 1)


def _run_one(plan: Plan, results: Path, reporter: Reporter, how: Any, as_json: bool) -> None:
    from upcycle_bench import record
    from upcycle_bench.run import run as execute

    path = execute(plan, results, reporter, **how)
    if path is None:  # this is not rank 0
        return
    if as_json:
        print(path.read_text(), end="")
    else:
        show_record(record.read(path), path)


def _show_dry_run(cells: Sequence[Cell], results: Path, fresh: bool, jobs: str, as_json: bool) -> None:
    from upcycle_bench.planning import plans
    from upcycle_bench.planning.matrix import preview

    if not is_main():
        return
    if len(cells) == 1:
        show_facts(plans.dry_run(cells[0].plan), as_json)
    else:
        done = preview(cells, results, fresh)
        to_do = [cell for cell, path in zip(cells, done, strict=True) if path is None]
        facts = {"jobs": chosen_jobs(to_do or cells, results)} if jobs == "auto" else {}
        show_preview(cells, done, {**plans.dry_run_of_matrix(cells, done), **facts}, as_json)


def show_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    """The facts of a dry run: what would run, and what it would cost."""
    if as_json:
        print(strict_json.dumps(facts, indent=2))
        return
    table("dry run", [{"what": key.replace("_", " "), "is": _plain(value)} for key, value in facts.items()])


def _plain(value: Any) -> str:
    """A value of a dry run for people."""
    if value is None:
        return "open until everything is given"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if isinstance(value, int) and value >= 10**12:
        return f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def show_record(made: Record, path: Path) -> None:
    """Scores and cost of a run, and its files."""
    from upcycle_bench.suite import is_average

    assert made.cost is not None
    averaged = any(is_average(score.dataset) for score in made.scores)
    seeds = made.seeds
    title = f"{made.strategy.label}, protocol {made.protocol.name}, seeds {seeds.init} and {seeds.train}"
    show_scores(title, [score.model_dump() for score in made.scores])
    show_skipped(made.skipped)
    scores = [score.model_dump() for score in made.scores]
    show_headlines({name: headline.model_dump() for name, headline in made.headlines.items()}, scores)
    if averaged:
        print(f"all {len(made.scores)} scores, strata included, stand in the record")
    cost = made.cost
    parts = [f"{name} {phase.seconds:.1f} s" for name, phase in cost.phases.items()]
    parts.append(f"{cost.parameters_total:,} parameters, {cost.parameters_active:,} active")
    if cost.samples_per_second:
        parts.append(f"{cost.samples_per_second:,.0f} samples/s")
    if cost.tokens_dropped is not None:
        parts.append(f"{cost.tokens_dropped:.1%} of choices dropped")
    print("; ".join(parts))
    show_certificate(made.certificate.model_dump() if made.certificate else None)
    from upcycle_bench.util.cache import cache_root

    print(f"weights: {cache_root() / 'weights' / f'{made.hashes.weights}.safetensors'}")
    print(f"record: {path}")


def show_matrix(cells: Sequence[Cell], done: Sequence[Path | None], *, stderr: bool = True) -> None:
    """A row for each strategy, a column for each seed: done, or to do."""
    rows: dict[str, dict[str, str]] = {}
    for cell, path in zip(cells, done, strict=True):
        row = rows.setdefault(cell.strategy, {"strategy": cell.strategy})
        row[f"seed {cell.seed}"] = "to do" if path is None else "done"
    table(f"protocol {cells[0].plan.protocol.name}", list(rows.values()), stderr=stderr)


def show_preview(cells: Sequence[Cell], done: Sequence[Path | None], facts: Mapping[str, Any], as_json: bool) -> None:
    """The dry run of a matrix: which cells are done, and the cost of the others."""
    if not as_json:
        show_matrix(cells, done, stderr=False)
        show_facts(facts, as_json=False)
        return
    rows = [
        {**_identity(cell), "done": path is not None, "record": str(path) if path else None}
        for cell, path in zip(cells, done, strict=True)
    ]
    show_facts({**facts, "matrix": rows}, as_json=True)


def show_outcomes(outcomes: Sequence[Outcome], as_json: bool, more: Mapping[str, Any] | None = None) -> None:
    """The outcome of each cell, strategy by strategy, as one JSON document, which has `more`, too, or as a table."""
    strategies = [outcome.cell.strategy for outcome in outcomes]
    outcomes = sorted(outcomes, key=lambda outcome: strategies.index(outcome.cell.strategy))
    rows = []
    for outcome in outcomes:
        made = outcome.made
        train = made.cost.phases.get("train") if made and made.cost else None
        rows.append(
            {
                **_identity(outcome.cell),
                "status": "failed" if outcome.reason else "ok",
                "ran": outcome.ran,
                "headlines": {name: each.value for name, each in made.headlines.items()} or None if made else None,
                "train_seconds": train.seconds if train else None,
                "record": str(outcome.path) if outcome.path else None,
                "reason": outcome.reason,
            }
        )
    if as_json:
        print(strict_json.dumps({**(more or {}), "runs": rows}, indent=2))
        return
    names = dict.fromkeys(name for row in rows for name in row["headlines"] or {})
    shown = [
        {
            "strategy": row["strategy"],
            "seed": outcome.cell.seed,
            **{name: _value(row["headlines"], name) for name in names},
            "train s": "" if row["train_seconds"] is None else f"{row['train_seconds']:.1f}",
            "status": row["status"],
        }
        for row, outcome in zip(rows, outcomes, strict=True)
    ]
    table(f"protocol {outcomes[0].cell.plan.protocol.name}", shown)
    for row, outcome in zip(rows, outcomes, strict=True):  # outside the table paths stay whole, to be copied
        print(f"{row['strategy']}, seed {outcome.cell.seed}: {row['reason'] or row['record'] or ''}")


def _value(headlines: dict[str, float] | None, name: str) -> str:
    """A headline score of a run, which may have others only: those of the first suite that did not fail."""
    if headlines is None:
        return "failed"
    return f"{headlines[name]:.4f}" if name in headlines else ""


def _identity(cell: Cell) -> dict[str, Any]:
    plan = cell.plan
    return {"strategy": plan.row, "seeds": {"init": plan.init_seed, "train": plan.train_seed}}
