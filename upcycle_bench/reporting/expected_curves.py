"""Reference curves: where the held-out score of a sound run lies at each step, by stored runs of other seeds.

    stored = read_curves()                          # ships with the package; tests/generate_docs.py makes it
    outside(stored, "dense", fingerprint, identity, points)     # the points that are not where they should be

A run on another machine is compared with runs of the same strategy, protocol and data. At each step its score has a
prediction interval of 99 %: mean ± t s √(1 + 1/n) over n seeds. The variance s² is pooled over the strategies, whose
runs of one seed share batches and so vary alike: t has the n - 1 degrees of freedom of one strategy. Few seeds make it
wide. Only protocols that bring their dense model have such curves; others train one of their own on each machine.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

from pydantic import Field

from upcycle_bench.protocol import Frozen
from upcycle_bench.record import Record
from upcycle_bench.reporting.comparable import counting_runs

FILE = "reference_curves.json"
STRATEGIES = ("dense", "sparse-upcycling")
ENOUGH = 3  # seeds
ROUNDING = 0.01  # of a log rank: what another machine's kernels may do to a model that is the same
LEVEL = 0.99


class Stored(Frozen):
    """The curves of one strategy under one protocol. `fingerprint`: of the training; `identity`: of the pairs."""

    protocol: str
    fingerprint: str
    strategy: str
    identity: str
    steps: tuple[int, ...]
    scores: dict[str, tuple[float, ...]] = Field(description="seeds, INIT/TRAIN -> the score at each step")


class StoredCurves(Frozen):
    """All that are stored."""

    curves: tuple[Stored, ...]


@dataclass(frozen=True)
class Outside:
    """A point outside of its interval."""

    step: int
    score: float
    low: float
    high: float
    seeds: int


def stored_of(records: Iterable[Record]) -> StoredCurves:
    """The curves of the closed runs of these strategies, as they are stored; of equal seeds the newest."""
    groups: dict[tuple[str, str, str, str, tuple[int, ...]], list[Record]] = defaultdict(list)
    for made in records:
        dense = made.protocol.resolved.get("dense")
        brings_dense = isinstance(dense, dict) and dense.get("source") != "pretrain"
        if made.strategy.label in STRATEGIES and made.validation and made.division == "closed" and brings_dense:
            steps = tuple(step for step, _ in made.validation.points)
            where = (made.protocol.name, made.protocol.training_fingerprint, made.strategy.label)
            key = (*where, made.validation.identity, steps)
            groups[key].append(made)
    return StoredCurves(
        curves=tuple(
            Stored(
                protocol=key[0],
                fingerprint=key[1],
                strategy=key[2],
                identity=key[3],
                steps=key[4],
                scores={
                    f"{init}/{train}": tuple(score for _, score in run.validation.points if run.validation)
                    for (init, train), run in sorted(
                        counting_runs(sorted(mine, key=lambda r: r.created_at))[key[2]].items()
                    )
                    if run.validation is not None
                },
            )
            for key, mine in sorted(groups.items())
        )
    )


@functools.cache
def read_curves() -> StoredCurves:
    """Those that ship with the package."""
    return StoredCurves.model_validate_json(resources.files("upcycle_bench.assets").joinpath(FILE).read_text())


def outside(
    stored: StoredCurves, strategy: str, fingerprint: str | None, identity: str, points: Sequence[tuple[int, float]]
) -> list[Outside] | None:
    """The points of a curve outside of their intervals; None where nothing is stored to compare it with.

    `fingerprint` is of the training, `identity` of the held-out pairs. The curve itself does not count as stored.
    """
    theirs = [each for each in stored.curves if (each.fingerprint, each.identity) == (fingerprint, identity)]
    own = next((each for each in theirs if each.strategy == strategy), None)
    if own is None:
        return None
    found, compared = [], 0
    for step, score in points:
        values = {each.strategy: _at(each, step, points) for each in theirs}
        if len(mine := values[strategy]) < ENOUGH:
            continue
        compared += 1
        low, high = interval(mine, list(values.values()))
        if not low <= score <= high:
            found.append(Outside(step, score, low, high, len(mine)))
    return found if compared else None


def interval(mine: Sequence[float], every: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Where a new value lies that belongs to `mine`; the deviation is that of `every` group of values around its mean.

    It is never narrower than ROUNDING to each side.
    """
    from scipy.special import stdtrit

    several = [values for values in every if len(values) > 1]
    squares = sum((len(values) - 1) * statistics.variance(values) for values in several)
    variance = squares / sum(len(values) - 1 for values in several)
    reach = float(stdtrit(len(mine) - 1, (1 + LEVEL) / 2)) * math.sqrt(variance * (1 + 1 / len(mine)))
    middle, reach = statistics.fmean(mine), max(reach, ROUNDING)
    return middle - reach, middle + reach


def _at(stored: Stored, step: int, points: Sequence[tuple[int, float]]) -> list[float]:
    """The stored scores at a step, without those of the same curve."""
    if step not in stored.steps:
        return []
    place, known = stored.steps.index(step), dict(zip(stored.steps, range(len(stored.steps)), strict=True))
    return [
        scores[place]
        for scores in stored.scores.values()
        if any(at not in known or scores[known[at]] != score for at, score in points)
    ]
