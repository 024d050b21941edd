"""Checks of a tuned row: its options are those that the protocol's rule chose, and what the choice cost is charged.

for what in tuned(sent, here): ...               # of the record alone
for path, what in over_all(every): ...           # against the records of its tuning runs, and of other tunings
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from upcycle_bench.planning.estimate import training_steps, unequal_shape
from upcycle_bench.planning.fingerprint import run_fingerprint
from upcycle_bench.planning.identity import mixed_ranks
from upcycle_bench.planning.plan import label_of
from upcycle_bench.planning.tuning import shared_overrides
from upcycle_bench.protocol import load_protocol
from upcycle_bench.record import Candidate, Record, TunedPart, TuningRun
from upcycle_bench.reporting.checks_identity import fingerprints, strategy_of, with_config
from upcycle_bench.reporting.comparable import table_of
from upcycle_bench.reporting.sent import Here, Sent, Unchecked
from upcycle_bench.strategy import Strategy, configure
from upcycle_bench.util.errors import UserError


def tuned(sent: Sent, here: Here) -> Iterator[str]:
    """The rule is the protocol's; there are not too many candidates; the best one won; no tuning seed is reported."""
    part, strategy = sent.record.strategy.tuned, sent.record.strategy
    if part is None or sent.protocol is None:
        return
    table = sent.protocol.tuning
    entry = here.registry.protocols.get(sent.protocol.name)
    with contextlib.suppress(UserError):  # of overrides, which the check `protocol` names
        if entry and table != load_protocol(entry.target, list(sent.protocol.overrides)).tuning:
            yield f"its tuning rule is not the one of protocol {sent.protocol.name} here"
    if table is None:
        yield f"tuned under {sent.protocol.name}, which has no tuning rule"
        return
    rule = (table.protocol, table.headline, table.rule, table.seeds)
    if (part.protocol, part.headline, part.rule, part.seeds) != rule:
        yield "protocol, headline score, rule or seeds of its tuning are not those of its protocol's rule"
    if len(part.candidates) > table.candidates:
        yield f"{len(part.candidates)} candidates, the rule allows {table.candidates}"
    if strategy.config != part.winner.config:
        yield f"its options are not those of the best candidate, {part.winner.label}"
    if not isinstance(found := strategy_of(sent, here), str):
        usual = configure(type(found), sent.protocol.strategies.get(strategy.name, {}))
        made = [with_config(type(found), candidate.config) for candidate in part.candidates]
        labels = [label_of(each, usual) for each in made]
        if labels[0] != strategy.name:
            yield f"its first candidate does not have the protocol's defaults: it is {labels[0]}"
        for candidate, label in zip(part.candidates, labels, strict=True):
            if candidate.label != label:
                yield f"the options of candidate {candidate.label} give {label}"
        for candidate, each in zip(part.candidates, made, strict=True):
            yield from _ids(sent, candidate, each)
    seeds = {sent.record.seeds.init, sent.record.seeds.train}
    if both := seeds & set(part.seeds):
        yield f"its seed {min(both)} is one of the tuning, which chose the options"
    closed, cost = sent.record.division == "closed", sent.record.cost
    if closed and part.flops is None and cost is not None and cost.charged_flops is not None:
        yield "FLOPs of its tuning runs are missing, though its own are counted"


def _ids(sent: Sent, candidate: Candidate, made: Strategy) -> Iterator[str]:
    """The ids of a candidate's runs again: they trained as the row did, but for options and seeds.

    Nothing where that does not give them: of a model that is not here, of several numbers of ranks, and of a protocol
    that trains its own dense model, on each machine another one. There the records of the tuning runs have to do.
    """
    record, part, protocol = sent.record, sent.record.strategy, sent.protocol
    if record.cost is None or protocol is None or sent.foreign_model:
        return
    if mixed_ranks(record.sessions or []) or protocol.dense.source == "pretrain":
        return
    trained = list(fingerprints(sent, unequal_shape(protocol, made)))
    for run in candidate.runs:
        ids = [
            run_fingerprint(
                label=candidate.label,
                owner=f"{part.distribution} {part.version}".strip(),
                code=part.code,
                config=candidate.config,
                steps=training_steps(protocol, made),
                training=training,
                dense=record.hashes.dense,
                seeds=(run.seed, run.seed),
                world_size=record.cost.world_size,
            )
            for training in trained
        ]
        if run.run_id not in ids:
            yield (
                f"tuning run {run.run_id} is not {candidate.label} with seed {run.seed}, trained as this row: "
                f"that is {ids[0]}"
            )


def over_all(every: Sequence[Sent]) -> Iterator[tuple[Path, str]]:
    """What several records say together: the tuning runs, and how often a strategy was tuned."""
    yield from _tuning_runs(every)
    yield from _one_row(every)


def _tuning_runs(every: Sequence[Sent]) -> Iterator[tuple[Path, str]]:
    """Options, seed, score and cost of each tuning run are those of its record, which a closed row needs."""
    by_id: dict[str, list[Sent]] = defaultdict(list)
    for sent in every:
        by_id[sent.record.run_id].append(sent)
    for sent in every:
        if (part := sent.record.strategy.tuned) is None:
            continue
        where = (part.protocol, tuple(shared_overrides(sent.record.protocol.overrides)))
        runs = [(candidate, run) for candidate in part.candidates for run in candidate.runs]
        missing = 0
        for candidate, run in runs:
            # A run under another protocol has the same id, and a run that was made again may have failed.
            made = [
                each.record
                for each in by_id[run.run_id]
                if each.record.status == "ok" and (each.record.protocol.name, each.record.protocol.overrides) == where
            ]
            missing += not made
            differing = [_differing(part, candidate, run, each) for each in made]
            if made and all(differing):
                yield (
                    sent.path,
                    f"tuning run {run.run_id} ({candidate.label}, seed {run.seed}) has another {differing[-1]}",
                )
        if missing:
            what = f"{missing} of its {len(runs)} tuning runs are not here"
            closed = sent.record.division == "closed"
            yield sent.path, f"{what}; send the records of the tuning runs, too" if closed else Unchecked(what)


def _differing(part: TunedPart, candidate: Candidate, run: TuningRun, made: Record) -> str:
    """What the record of a tuning run says otherwise; "" where nothing."""
    headline, cost = made.headlines.get(part.headline), made.cost
    facts = {
        "label": made.strategy.label == candidate.label,
        "configuration": made.strategy.config == candidate.config,
        "seed": (made.seeds.init, made.seeds.train) == (run.seed, run.seed),
        "score": headline is not None
        and headline.higher_is_better == part.higher_is_better
        and math.isclose(headline.value, run.value, rel_tol=1e-9),
        "cost": cost is not None and cost.charged_flops == run.flops,
    }
    return ", ".join(name for name, same in facts.items() if not same)


def _one_row(every: Sequence[Sent]) -> Iterator[tuple[Path, str]]:
    """All tuned runs of one strategy in one table have one choice."""
    newest: dict[tuple[object, ...], Sent] = {}
    tuned = [sent for sent in every if sent.record.strategy.tuned and sent.record.status == "ok"]
    for sent in sorted(tuned, key=lambda each: each.record.created_at, reverse=True):
        strategy = sent.record.strategy
        first = newest.setdefault((strategy.name, *table_of(sent.record)), sent)
        if strategy.tuned != first.record.strategy.tuned:
            yield (
                sent.path,
                f"{strategy.name} has one tuned row in a table, and {first.path.name} is of another, newer tuning; "
                "leave one of them out",
            )
