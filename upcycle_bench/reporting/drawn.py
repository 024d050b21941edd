"""Headline scores of runs under common draws of the evaluation samples: how sure a strategy's mean or a difference is.

    drawn = Drawn(runs, "shift", outcomes)
    drawn.sure("cluster-aware")                         # `resampling.Sure` of its mean
    drawn.sure("cluster-aware", "sparse-upcycling")     # of the difference, paired by both seeds

Shape suffixes as in `resampling`: R runs, N samples, S training seeds, B draws, L strategies.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from upcycle_bench.record import Record, ScoreRecord
from upcycle_bench.reporting.comparable import Counting, SeedPair
from upcycle_bench.reporting.resampling import Sure, of_seeds, rank_intervals, sample_draws, seed_draws
from upcycle_bench.util.uncertainty import Z

# Of each score of a record the numbers [N] of its samples, whose mean it is, by suite/dataset/metric, as its suite says
# (`sampled_scores.numbers_of`); scores without such numbers are left out.
Outcomes = Callable[[Record], Mapping[str, Any]]


class Drawn:
    """The runs' headline scores, and the same under common draws of the evaluation samples."""

    def __init__(self, runs: Counting, headline: str, outcomes: Outcomes) -> None:
        self._place = {
            (label, seeds): number
            for number, (label, seeds) in enumerate((label, seeds) for label, mine in runs.items() for seeds in mine)
        }
        every = [run for mine in runs.values() for run in mine.values()]
        self._value_R = np.array([run.headlines[headline].value for run in every])
        sets = _sets(every, headline, outcomes)
        self._drawn_RB = None if sets is None else sample_draws(sets)
        if self._drawn_RB is not None:
            # Sets may share images, so a record's error is an upper bound of the one that independent draws give.
            rest_RB = self._drawn_RB - self._drawn_RB.mean(1, keepdims=True)
            errors = [run.headlines[headline].standard_error or 0.0 for run in every]
            drawn = float(rest_RB.std(1).mean())
            rest_RB *= max(1.0, statistics.fmean(errors) / drawn) if drawn else 1.0
            self._drawn_RB = self._value_R[:, None] + rest_RB
        self._seeds = {label: list(mine) for label, mine in runs.items()}

    @property
    def has_samples(self) -> bool:
        """Whether errors are over samples, too."""
        return self._drawn_RB is not None

    def common(self, label: str, other: str) -> list[SeedPair]:
        """The pairs of seeds that both have."""
        return [seeds for seeds in self._seeds.get(label, []) if (other, seeds) in self._place]

    def sure(self, label: str, other: str | None = None) -> Sure | None:
        """The mean of a strategy, or of its difference to another one; None without common seeds."""
        seeds = self.common(label, label if other is None else other)
        if not seeds:
            return None
        value_S, drawn_SB = self._by_seed(label, seeds)
        if other is not None:
            base_S, base_SB = self._by_seed(other, seeds)
            value_S, drawn_SB = value_S - base_S, None if drawn_SB is None else drawn_SB - base_SB
        return of_seeds(value_S, drawn_SB)

    def ranks(self, labels: Sequence[str], higher_is_better: bool) -> list[tuple[int, int]]:
        """The interval of each one's rank; deviations are enlarged as Student's quantile is to the normal one."""
        draws = []
        for label in labels:
            seeds = self._seeds[label]
            value_S, drawn_SB = self._by_seed(label, seeds)
            sure = of_seeds(value_S, drawn_SB)
            drawn_B = seed_draws(value_S, drawn_SB, key=sorted({train for _, train in seeds}))
            wider = (sure.half_width or 0.0) / (Z * (sure.standard_error or 1.0)) or 1.0
            draws.append(sure.mean + wider * (drawn_B - sure.mean))
        return rank_intervals(np.array(draws), higher_is_better)

    def _by_seed(self, label: str, seeds: Sequence[SeedPair]) -> tuple[np.ndarray, np.ndarray | None]:
        """Values [S] and draws [S, B] by ascending training seed, of which the initialisations are averaged."""
        places: dict[int, list[int]] = defaultdict(list)
        for pair in seeds:
            places[pair[1]].append(self._place[label, pair])
        ordered = [places[train] for train in sorted(places)]
        value_S = np.array([self._value_R[each].mean() for each in ordered])
        if self._drawn_RB is None:
            return value_S, None
        return value_S, np.array([self._drawn_RB[each].mean(0) for each in ordered])


def _sets(runs: Sequence[Record], headline: str, outcomes: Outcomes) -> list[tuple[np.ndarray, float]] | None:
    """The outcomes [R, N] of each set of samples, and its weight in the headline score; None unless all runs have all.

    Questions about the same samples are averaged. Where a record's standard error says that samples depend on each
    other, such as the captions of one image, deviations are enlarged by as much (the design effect of L. Kish, 1965).
    """
    parts = [score for score in runs[0].scores if score.headline == headline]
    columns = [(score.suite, score.dataset, score.metric) for score in parts]
    found: dict[tuple[str, str, int], list[np.ndarray]] = defaultdict(list)
    read = [outcomes(run) for run in runs]
    for suite, dataset, metric in columns:
        rows: list[np.ndarray] = []
        for run, arrays in zip(runs, read, strict=True):
            score = next((s for s in run.scores if (s.suite, s.dataset, s.metric) == (suite, dataset, metric)), None)
            row_N = None if score is None else _row(score, arrays)
            if row_N is None or (rows and len(row_N) != len(rows[0])):
                return None
            rows.append(row_N)
        found[suite, dataset, len(rows[0])].append(np.array(rows))
    return [(np.mean(each, axis=0), len(each) / len(columns)) for each in found.values()] or None


def _row(score: ScoreRecord, arrays: Mapping[str, Any]) -> np.ndarray | None:
    """The outcomes of a score; None where there are none, or where it is not their mean."""
    found = arrays.get(f"{score.suite}/{score.dataset}/{score.metric}")
    if found is None or len(found) < 2:
        return None
    outcome_N = np.asarray(found, dtype=np.float64)
    if not abs(outcome_N.mean() - score.value) <= 1e-5 * max(1.0, abs(score.value)):  # a NaN is not
        return None
    alone = outcome_N.std(ddof=1) / math.sqrt(len(outcome_N))
    factor = score.standard_error / alone if score.standard_error and alone > 0 else 1.0
    return score.value + max(1.0, factor) * (outcome_N - outcome_N.mean())
