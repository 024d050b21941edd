"""What a strategy needed to get where another one ended: steps and charged FLOPs, by curves of held-out pairs.

    target = target_of(runs, references)            # seeds -> record, of the strategy and of the reference
    target.steps, target.ratio                      # 412.5 steps; 0.83 of what the reference needed to get there

Single scores are noisy, and a lucky one must not count. So each side has one curve, the mean over the seeds that both
have, and in its place the monotone one that is nearest by least squares (isotonic regression). The goal is the end of
the reference's. It is reached where a curve, drawn straight from point to point, is there first; so is it by the
reference itself, whose ratio is 1. FLOPs are charged ones: all before the training, and the share of training and
validation up to that step.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from upcycle_bench.record import Record
from upcycle_bench.reporting.comparable import Counting, SeedPair

BY_STEPS = ("train", "validate")  # phases whose cost grows with the steps
REFERENCES = ("dense", "sparse-upcycling")
Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Target:
    """The way to a reference's final score, over `runs` pairs of runs.

    steps: None where the strategy did not get there. flops: until then, a mean over runs; ratio: by those that the
    reference needed. Both are None where FLOPs were not counted.
    """

    steps: float | None
    flops: float | None
    ratio: float | None
    runs: int


def targets_of(counting: Counting, label: str) -> dict[str, Target]:
    """The way to the final score of each reference that has comparable curves."""
    found = {name: target_of(counting[label], counting[name]) for name in REFERENCES if name in counting}
    return {name: target for name, target in found.items() if target is not None}


def target_of(runs: Mapping[SeedPair, Record], references: Mapping[SeedPair, Record]) -> Target | None:
    """The way to the reference's final score, over the pairs of seeds that both have with comparable curves."""
    pairs = [(run, references[seeds]) for seeds, run in sorted(runs.items()) if seeds in references]
    pairs = [(run, other) for run, other in pairs if curves_compare(run, other)]
    if not pairs:
        return None
    mine, theirs = (monotone(_mean_curve(each)) for each in zip(*pairs, strict=True))
    step, usual = first_at(mine, theirs[-1][1]), first_at(theirs, theirs[-1][1])
    if step is None or usual is None:
        return Target(None, None, None, len(pairs))
    flops = _mean([_flops_until(run, step) for run, _ in pairs])
    needed = _mean([_flops_until(other, usual) for _, other in pairs])
    return Target(step, flops, flops / needed if flops is not None and needed else None, len(pairs))


def curves_compare(run: Record, other: Record) -> bool:
    """Whether both have curves of the same held-out pairs, up to the end of their trainings."""
    mine, theirs = run.validation, other.validation
    if mine is None or theirs is None or mine.identity != theirs.identity:
        return False
    return mine.points[-1][0] == _steps(run) and theirs.points[-1][0] == _steps(other)


def first_at(points: Points, goal: float) -> float | None:
    """The step at which a curve, drawn straight from point to point, is at most `goal` for the first time; or None."""
    if points[0][1] <= goal:
        return float(points[0][0])
    for (step, score), (later, lower) in itertools.pairwise(points):
        if lower <= goal:
            return step + (later - step) * (score - goal) / (score - lower)
    return None


def monotone(points: Points) -> list[tuple[int, float]]:
    """The points of the curve that never rises and is nearest to these by least squares."""
    from scipy.optimize import isotonic_regression

    steps, scores = zip(*points, strict=True)
    return list(zip(steps, isotonic_regression(scores, increasing=False).x.tolist(), strict=True))


def _mean_curve(runs: Sequence[Record]) -> list[tuple[int, float]]:
    """The mean at each step that all of these have."""
    curves = [dict(run.validation.points) for run in runs if run.validation is not None]
    steps = sorted(set.intersection(*map(set, curves)))
    return [(step, statistics.fmean(curve[step] for curve in curves)) for step in steps]


def _steps(run: Record) -> int:
    return run.cost.phases["train"].steps if run.cost and "train" in run.cost.phases else 0


def _flops_until(run: Record, step: float) -> float | None:
    """Charged FLOPs of a run up to a step of its training."""
    assert run.cost is not None
    share, tuned = step / max(1, _steps(run)), run.strategy.tuned
    total: float | None = tuned.flops if tuned else 0.0
    for name, phase in run.cost.charged.items():
        if total is None or phase.flops is None:
            return None
        total += phase.flops * (share if name in BY_STEPS else 1)
    return total


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.fmean(value for value in values if value is not None)
