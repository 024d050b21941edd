"""What a strategy needed to get where another one ended: steps and charged FLOPs, by curves of held-out pairs.

    target = target_of(runs, references)            # seeds -> record, of the strategy and of the reference
    target.steps, target.ratio                      # 412.5 steps; 0.83 of all that the reference spent

Single scores are noisy, and the first lucky one must not count. So each curve is replaced by the monotone one that is
nearest to it by least squares (isotonic regression). The goal of a run is the end of the reference's curve with the
same seeds; it is reached where the run's own, drawn straight from point to point, is there. FLOPs are charged ones: all
before the training, and the share of training and validation up to that step.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from upcycle_bench.record import Record
from upcycle_bench.reporting.comparable import Counting, SeedPair

BY_STEPS = ("train", "validate")  # phases whose cost grows with the steps
NOT_CHARGED = ("evaluate",)
REFERENCES = ("dense", "sparse-upcycling")


@dataclass(frozen=True)
class Target:
    """The way to a reference's final score. Means over runs; None unless all of them reached it, or have counted FLOPs.

    ratio: FLOPs by all that the reference's runs spent before their evaluation. reached: how many of the `runs`.
    """

    steps: float | None
    flops: float | None
    ratio: float | None
    reached: int
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
    found = [(run, other, step) for run, other in pairs if (step := _reached(run, other)) is not None]
    if len(found) < len(pairs):
        return Target(None, None, None, len(found), len(pairs))
    spent = [_flops_until(run, step) for run, _, step in found]
    whole = [other.charged_flops for _, other, _ in found]
    flops = None if None in spent else statistics.fmean(each for each in spent if each is not None)
    usual = None if None in whole else statistics.fmean(each for each in whole if each is not None)
    return Target(
        steps=statistics.fmean(step for _, _, step in found),
        flops=flops,
        ratio=flops / usual if flops is not None and usual else None,
        reached=len(found),
        runs=len(pairs),
    )


def curves_compare(run: Record, other: Record) -> bool:
    """Whether both have curves of the same held-out pairs."""
    mine, theirs = run.validation, other.validation
    return mine is not None and theirs is not None and mine.identity == theirs.identity


def first_at(points: Sequence[tuple[int, float]], goal: float) -> float | None:
    """The step at which a curve, drawn straight from point to point, is at most `goal` for the first time; or None."""
    if points[0][1] <= goal:
        return float(points[0][0])
    for (step, score), (later, lower) in itertools.pairwise(points):
        if lower <= goal:
            return step + (later - step) * (score - goal) / (score - lower)
    return None


def monotone(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points of the curve that never rises and is nearest to these by least squares."""
    from scipy.optimize import isotonic_regression

    steps, scores = zip(*points, strict=True)
    return list(zip(steps, isotonic_regression(scores, increasing=False).x.tolist(), strict=True))


def _reached(run: Record, other: Record) -> float | None:
    assert run.validation is not None and other.validation is not None
    return first_at(monotone(run.validation.points), monotone(other.validation.points)[-1][1])


def _flops_until(run: Record, step: float) -> float | None:
    """Charged FLOPs of a run up to a step of its training."""
    assert run.validation is not None and run.cost is not None
    share = step / max(1, run.validation.points[-1][0])
    tuned = run.strategy.tuned
    total: float | None = tuned.flops if tuned else 0.0
    for name, phase in run.cost.phases.items():
        if name in NOT_CHARGED:
            continue
        if total is None or phase.flops is None:
            return None
        total += phase.flops * (share if name in BY_STEPS else 1)
    return total
