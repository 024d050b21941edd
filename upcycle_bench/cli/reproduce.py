"""`upcycle-bench reproduce`: run again what a record says, and compare. Imports nothing heavy."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upcycle_bench.cli.common import (
    Checkpoint,
    Data,
    EvalData,
    Json,
    interruptible,
    is_main,
    open_registry,
    terminal_reporter,
    uncollected,
)
from upcycle_bench.cli.run import show_facts
from upcycle_bench.cli.tables import table
from upcycle_bench.util import strict_json

if TYPE_CHECKING:
    from upcycle_bench.reproduce import Again


def reproduce(
    path: Annotated[Path, typer.Argument(metavar="RECORD", help="The record of a run.")],
    results: Annotated[Path | None, typer.Option(help="Where the new record goes; else it is not kept.")] = None,
    data: Data = None,
    checkpoint: Checkpoint = None,
    eval_data: EvalData = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and what differs here.")] = False,
    as_json: Json = False,
) -> None:
    """Run a record's run again and compare: equal to the bit, or by how much each score differs."""
    with uncollected():
        from upcycle_bench import reproduce as again
        from upcycle_bench.planning.plan import Paths
        from upcycle_bench.planning.plans import dry_run as facts_of
        from upcycle_bench.reporting.sent import Here, open_whole
        from upcycle_bench.run import run

    sent, registry, reporter = open_whole(path), open_registry(), terminal_reporter()
    given = Paths(data=data, checkpoint=checkpoint, eval_data=eval_data)
    with interruptible("nothing was written"):
        plan = again.plan_of(sent, registry, given, reporter, build=not dry_run)
        differing = again.differs_here(sent.record, plan)
        if is_main():
            print(f"different here: {'; '.join(differing) or 'nothing'}", file=sys.stderr)
        if dry_run:
            if is_main():
                show_facts(facts_of(plan) | {"different_here": differing}, as_json)
            return
        with tempfile.TemporaryDirectory() as folder:
            made = run(plan, results or Path(folder), reporter, fresh=True)
            found = None if made is None else again.compare_again(sent, open_whole(made), Here(registry, eval_data))
    if found is None:  # this is not rank 0
        return
    show_again(found, made if results else None, as_json)
    if not found.reproduced:
        raise typer.Exit(1)


def show_again(found: Again, made: Path | None, as_json: bool) -> None:
    """Where it is not equal, a table of the scores; then the verdict."""
    if as_json:
        print(strict_json.dumps(found.facts() | {"record": str(made) if made else None}, indent=2))
        return
    if not found.equal:
        rows = [
            {
                "dataset": score.dataset,
                "metric": score.metric,
                "record": f"{score.one:.4f}",
                "here": f"{score.other:.4f}",
                "difference": f"{score.difference:+.2g}",
                "verdict": "inside" if inside else "OUTSIDE",
            }
            for score, inside in zip(found.scores, found.inside, strict=True)
        ]
        table("scores, held against the record's 95 % intervals over samples", rows)
    outside = found.inside.count(False)
    if found.missing:
        print(f"{len(found.missing):,} scores of the record were not made here, the first: {found.missing[0]}")
    weights = "the weights are the same" if found.same_weights else "the weights differ"
    if found.equal:
        print(f"equal to the bit: weights and {len(found.scores):,} scores")
    elif found.reproduced:
        print(f"reproduced: {weights}, and all {len(found.scores):,} scores lie inside the intervals")
    else:
        print(f"not reproduced: {weights}, and {outside:,} of {len(found.scores):,} scores lie outside the intervals")
    if made:
        print(f"record: {made}")
