"""The view of equal compute: each strategy beside dense training, or sparse upcycling, that cost as much.

    peers_of(counting, "sparse-upcycling")["cluster-aware"]     # "sparse-at-compute[compute=1.66]", or None

What a strategy spends before its training and beside it is charged. Who spent at most NEAR more than the reference is
compared with the reference itself; another one with a run of its kind whose charged FLOPs are within NEAR of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from upcycle_bench.record import Record
from upcycle_bench.reporting.comparable import Counting

NEAR = 0.05  # a share of the FLOPs
# A reference, and the strategies that train it for longer.
KINDS = {
    "sparse-upcycling": ("sparse-upcycling", "sparse-at-compute"),
    "dense": ("dense", "dense-longer", "dense-at-compute"),
}
LONGER = {"sparse-upcycling": "sparse-at-compute", "dense": "dense-at-compute"}


def any_of(kind: str, records: Iterable[Record]) -> bool:
    """Whether the reference itself is among the records."""
    return any(record.strategy.label == kind and record.status == "ok" for record in records)


def peers_of(counting: Counting, kind: str) -> dict[str, str | None]:
    """For each strategy the label of the run of that kind that cost as much; None where there is none.

    Those of the kind are their own: there is nothing to compare.
    """
    costs = {label: _cost(runs.values()) for label, runs in counting.items()}
    names = {label: {run.strategy.name for run in runs.values()} for label, runs in counting.items()}
    longer = {*KINDS[kind]} - {kind}  # not the reference with other options: that is another strategy
    same = {label: cost for label, cost in costs.items() if cost and (label == kind or names[label] <= longer)}
    return {label: label if label in same else _nearest(cost, same, kind) for label, cost in costs.items()}


def _nearest(cost: float | None, same: dict[str, float], kind: str) -> str | None:
    if cost is None or kind not in same:
        return None
    if cost <= same[kind] * (1 + NEAR):
        return kind
    near = {label: abs(other / cost - 1) for label, other in same.items()}
    best = min(near, key=lambda label: (near[label], label))
    return best if near[best] <= NEAR else None


def _cost(runs: Iterable[Record]) -> float | None:
    """The mean charged FLOPs; None where some are unknown."""
    known = [run.charged_flops for run in runs if run.cost]
    return None if None in known or not known else statistics.fmean(flops for flops in known if flops is not None)
