"""Checks of a tuned row: its options are those that the protocol's rule chose, and what the choice cost is charged.

for what in tuned(sent, here): ...               # of the record alone
for path, what in tuning_runs(every): ...        # against the records of its tuning runs, where they are sent, too
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from upcycle_bench.planning.plan import label_of
from upcycle_bench.planning.tuning import shared_overrides
from upcycle_bench.protocol import load_protocol
from upcycle_bench.record import Candidate, TunedPart, TuningRun
from upcycle_bench.reporting.checks_identity import strategy_of, with_config
from upcycle_bench.reporting.sent import Here, Sent, Unchecked
from upcycle_bench.strategy import configure
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
        labels = [label_of(with_config(type(found), candidate.config), usual) for candidate in part.candidates]
        if labels[0] != strategy.name:
            yield f"its first candidate does not have the protocol's defaults: it is {labels[0]}"
        for candidate, label in zip(part.candidates, labels, strict=True):
            if candidate.label != label:
                yield f"the options of candidate {candidate.label} give {label}"
    seeds = {sent.record.seeds.init, sent.record.seeds.train}
    if both := seeds & set(part.seeds):
        yield f"its seed {min(both)} is one of the tuning, which chose the options"


def tuning_runs(every: Sequence[Sent]) -> Iterator[tuple[Path, str]]:
    """Options, seed, score and cost of each tuning run are those of its record."""
    by_id = {sent.record.run_id: sent for sent in every}
    for sent in every:
        if (part := sent.record.strategy.tuned) is None:
            continue
        overrides = tuple(shared_overrides(sent.record.protocol.overrides))
        runs = [(candidate, run) for candidate in part.candidates for run in candidate.runs]
        for candidate, run in runs:
            if run.run_id in by_id and (what := _differing(part, candidate, run, by_id[run.run_id], overrides)):
                yield sent.path, f"tuning run {run.run_id} ({candidate.label}, seed {run.seed}) has another {what}"
        if missing := sum(run.run_id not in by_id for _, run in runs):
            yield sent.path, Unchecked(f"{missing} of its {len(runs)} tuning runs are not here")


def _differing(part: TunedPart, candidate: Candidate, run: TuningRun, sent: Sent, overrides: tuple[str, ...]) -> str:
    """What the record of a tuning run says otherwise; "" where nothing."""
    made = sent.record
    headline, cost = made.headlines.get(part.headline), made.cost
    facts = {
        "protocol": (made.protocol.name, made.protocol.overrides) == (part.protocol, overrides),
        "label": made.strategy.label == candidate.label,
        "configuration": made.strategy.config == candidate.config,
        "seed": (made.seeds.init, made.seeds.train) == (run.seed, run.seed),
        "score": headline is not None
        and headline.higher_is_better == part.higher_is_better
        and math.isclose(headline.value, run.value, rel_tol=1e-9),
        "cost": cost is not None and cost.charged_flops == run.flops,
    }
    return ", ".join(name for name, same in facts.items() if not same)
