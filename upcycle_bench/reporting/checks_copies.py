"""Checks over several records: a run that is sent twice, and results that two runs cannot both have.

    for path, what in copies(every): ...             # a line for each record that repeats an earlier one

Rounding alone keeps two trainings apart, so equal weights, outcomes or lines of metrics come from one training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from upcycle_bench.record import Record
from upcycle_bench.reporting.sent import Sent

Named = tuple[Path, str]


def copies(every: Sequence[Sent]) -> Iterator[Named]:
    """A record that stands here twice, under whatever name of its file."""
    for first, again in _again(every, lambda sent: (sent.record.run_id, sent.record.created)):
        yield again.path, f"it is the run of {first.path.name}, which is here, too"


def same_results(every: Sequence[Sent]) -> Iterator[Named]:
    """Weights, outcomes or lines of metrics of another strategy or other seeds, or of other weights.

    A rerun, and a run of another protocol with the same training, have the same for good reason. So has a strategy
    without randomness under another initialisation seed.
    """
    for what, key in (
        ("weights", lambda sent: sent.record.hashes.weights),
        ("outcomes", lambda sent: sent.record.hashes.outcomes),
        ("metrics", lambda sent: sent.metrics and hashlib.sha256(sent.metrics).hexdigest()),
    ):
        for first, again in _again(every, key):
            if _others(first, again) or (what != "weights" and _weights(first) != _weights(again)):
                ours, theirs = _run(again.record), _run(first.record)
                yield again.path, f"its {what} are those of {first.path.name}: {ours} cannot have what {theirs} has"


def _again(every: Sequence[Sent], key: Callable[[Sent], Any]) -> Iterator[tuple[Sent, Sent]]:
    """Each record whose key an earlier one has, with the first that has it; without those that have no key."""
    seen: dict[Any, Sent] = {}
    for sent in every:
        if (value := key(sent)) is not None:
            if value in seen:
                yield seen[value], sent
            else:
                seen[value] = sent


def _others(first: Sent, again: Sent) -> bool:
    """Whether these are two trainings, which cannot end with the same weights."""
    one, two = first.record, again.record
    mine, others = ((each.strategy.name, each.strategy.config) for each in (one, two))
    if mine != others:  # a tuned row has the training of its options, whatever its label
        return True
    control = one.strategy.status == "control"
    return bool(first.steps) and (
        one.seeds.train != two.seeds.train or (one.seeds.init != two.seeds.init and not control)
    )


def _weights(sent: Sent) -> str | None:
    return sent.record.hashes.weights


def _run(record: Record) -> str:
    return f"{record.strategy.label}, seeds {record.seeds.init} and {record.seeds.train},"
