"""Tuning: run the candidates on the tuning sets, choose by the protocol's rule, run the winner, and charge for all.

    task = tuning(registry, "drop-upcycling", protocol, [{"ratio": "0.75"}], paths, reporter)
    tuned, outcomes = tune(task, [(0, 0), (1, 1)], results, reporter, jobs=1, shared=[], tried=[])
    tuned.winner.label, tuned.flops                 # what the records of the row say of the choice

What has a record is not run again, so the same command goes on. The winner's row is `drop-upcycling[tuned]`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upcycle_bench import record
from upcycle_bench.planning.matrix import Cell, SeedPair, enumerate_cells, finished_before
from upcycle_bench.planning.plan import Paths, Plan, make_plan
from upcycle_bench.planning.registry import Registry
from upcycle_bench.planning.tuning import candidates, tuning_of
from upcycle_bench.protocol import Protocol, Tuning
from upcycle_bench.record import Record, TunedPart
from upcycle_bench.run import run
from upcycle_bench.run_many import Live, Show, run_all
from upcycle_bench.run_queue import Outcome
from upcycle_bench.training import session
from upcycle_bench.util import distributed, meter, strict_json
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.progress import Reporter


class NothingChosen(UserError):
    """A candidate that failed; the record of its run says why."""

    status = 1


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is tuned: candidates on the tuning protocol, and how one of them is planned under the protocol itself."""

    table: Tuning
    protocol: Protocol
    plans: list[Plan]
    planned: Callable[[Mapping[str, Any]], Plan]

    @property
    def cells(self) -> list[Cell]:
        """The tuning runs: each candidate with each tuning seed."""
        return list(enumerate_cells(self.plans, [(seed, seed) for seed in self.table.seeds]))

    def reported(self, tuned: TunedPart, pairs: Iterable[SeedPair]) -> list[Cell]:
        """The runs of the tuned row."""
        (winner,) = [plan for plan in self.plans if plan.label == tuned.winner.label]
        return list(enumerate_cells([replace(self.planned(winner.options), tuned=tuned)], pairs))


def tuning(
    registry: Registry,
    strategy: str,
    protocol: Protocol,
    tries: Sequence[Mapping[str, str]],
    paths: Paths,
    reporter: Reporter,
) -> Task:
    """What `tune` will do; nothing is run. UserError for whatever is wrong with protocol, options or their number."""
    table, dev = tuning_of(registry, protocol)
    plans = candidates(registry, strategy, table, dev, tries, paths=paths, reporter=reporter)

    def planned(options: Mapping[str, Any]) -> Plan:
        world = plans[0].world
        return make_plan(registry, strategy, protocol, options=options, paths=paths, reporter=reporter, world=world)

    planned({})  # what is wrong with it is said before the candidates run
    return Task(table=table, protocol=protocol, plans=plans, planned=planned)


def tune(
    task: Task,
    pairs: Sequence[SeedPair],
    results: Path,
    reporter: Reporter,
    *,
    jobs: int,
    shared: Sequence[str],
    tried: Sequence[str],
    show: Show = lambda cells, done: None,
    live: Live | None = None,
) -> tuple[TunedPart, list[Outcome]]:
    """The choice, and the outcomes of the tuned row, one for each of `pairs` of seeds. Every rank must call it.

    `shared`: the command-line options of other processes, without protocol and overrides; `tried`: more of them, for
    the tuned row alone. NothingChosen where a candidate's run fails.
    """
    how: dict[str, Any] = {"jobs": jobs, "fresh": False, "show": show, "live": live}
    # One session for both matrices, as `run_all` has one for all cells; processes of their own have none here.
    with contextlib.nullcontext() if jobs > 1 else session.open_session(task.protocol.threads):
        outcomes = run_all(task.cells, results, reporter, shared=[*_named(task.plans[0].protocol), *shared], **how)
        tuned = distributed.from_main(choose(task.table, outcomes) if distributed.is_main() else None)
        reporter.say(f"chosen: {tuned.winner.label}, the best of {len(tuned.candidates)}")
        cells = task.reported(tuned, pairs)
        if len(cells) == 1:
            return tuned, [_alone(cells[0], results, reporter, show)]
        here = [*_named(task.protocol), *tried, *shared]
        return tuned, run_all(cells, results, reporter, shared=here, **how)


def _named(protocol: Protocol) -> list[str]:
    """The command-line options that give this protocol; the tuning protocol has no overrides of the rule."""
    return ["--protocol", protocol.name, *(part for override in protocol.overrides for part in ("--set", override))]


def _alone(cell: Cell, results: Path, reporter: Reporter, show: Show) -> Outcome:
    """One run, outside of any matrix: the process that a matrix starts for it must not wait for that matrix."""

    def done() -> Path | None:
        return finished_before([cell], results)[0]

    before = distributed.from_main(done() if distributed.is_main() else None)
    if distributed.is_main():
        show([cell], [before])
    meter.forget_peak_memory()
    path = before or run(cell.plan, results, reporter, done=done)
    return Outcome(cell=cell, path=path, made=record.read(path) if path else None, ran=before is None)


def choose(table: Tuning, outcomes: Sequence[Outcome]) -> TunedPart:
    """What was chosen, from the outcomes of all candidates and tuning seeds, seed by seed.

    NothingChosen where one of them failed: a candidate is compared whole or not at all.
    """
    made: dict[str, list[Record]] = {}
    for outcome in outcomes:
        if outcome.made is None or outcome.reason is not None:
            why = str(outcome.reason).rstrip(".")
            raise NothingChosen(
                f"nothing is chosen, since {outcome.cell.strategy}, seed {outcome.cell.seed} failed: {why}. "
                "The same command tries it again; else leave that --try out."
            )
        made.setdefault(outcome.cell.strategy, []).append(outcome.made)
    every = [run for runs in made.values() for run in runs]
    tree = {
        **table.model_dump(mode="json", include={"protocol", "headline", "rule", "seeds"}),
        "higher_is_better": every[0].headlines[table.headline].higher_is_better,
        "candidates": [
            {"label": label, "config": runs[0].strategy.config, "runs": [_run(table.headline, run) for run in runs]}
            for label, runs in made.items()
        ],
    }
    return TunedPart.model_validate_json(strict_json.dumps(tree))


def _run(headline: str, made: Record) -> dict[str, Any]:
    assert made.cost is not None
    return {
        "run_id": made.run_id,
        "seed": made.seeds.train,
        "value": made.headlines[headline].value,
        "flops": made.charged_flops,
        "seconds": sum(phase.seconds for phase in made.cost.charged.values()),
    }
