"""How strategies stand to each other in one headline score: intervals, differences to a reference, ranks, verdicts.

    standings = stand(counting, "shift", higher_is_better=False, reference="sparse-upcycling", outcomes=read)
    standings["drop-upcycling"].verdict             # better, tied, worse, undecided, not yet ranked, reference

Differences are paired by both seeds. Their p-values are Holm's, over all strategies of the table. A difference is
*better* or *worse* where that is below 0.05; *tied* where its whole interval is within one run's standard deviation
over training seeds, pooled over strategies; else *undecided*. With fewer than three training seeds nothing is ranked.

Shape suffixes as in `resampling`: R runs, N samples, S training seeds, B draws, L strategies.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from upcycle_bench.record import Record, ScoreRecord
from upcycle_bench.reporting.comparable import SeedPair
from upcycle_bench.reporting.resampling import (
    ENOUGH,
    Sure,
    holm,
    of_seeds,
    rank_intervals,
    sample_draws,
    seed_draws,
    tied_groups,
)
from upcycle_bench.util.uncertainty import Z

SIGNIFICANT = 0.05
MOST = 60  # strategies that get letters
Counting = Mapping[str, Mapping[SeedPair, Record]]  # strategy's label -> its runs that count
Outcomes = Callable[[Record], Mapping[str, Any]]  # of each sample, by suite/dataset/name; none where there are none


@dataclass(frozen=True)
class Standing:
    """One strategy in one headline score.

    of_init, of_train: standard deviations over initialisation and training seeds, each with the other seed fixed; None
    where no two runs tell. p: Holm's, of the difference. ranks: 95 %. letters: strategies that share one cannot be told
    apart.
    """

    score: Sure
    of_init: float | None
    of_train: float | None
    difference: Sure | None
    p: float | None
    ranks: tuple[int, int] | None
    letters: str
    verdict: str


def stand(
    counting: Counting, headline: str, *, higher_is_better: bool, reference: str | None, outcomes: Outcomes
) -> dict[str, Standing]:
    """The standing of each strategy that has the headline score."""
    runs = with_all_parts(counting, headline)
    drawn = _Drawn(runs, headline, outcomes)
    scores = {label: sure for label in runs if (sure := drawn.sure(label)) is not None}
    ranked = [label for label in runs if scores[label].seeds >= ENOUGH]
    differences = {
        label: drawn.sure(label, reference) for label in runs if reference not in (None, label) and reference in runs
    }
    against = {label: sure for label, sure in differences.items() if sure is not None and sure.seeds >= ENOUGH}
    corrected = _corrected({label: sure.p for label, sure in against.items()})
    sign = -1 if higher_is_better else 1
    order = sorted(ranked, key=lambda label: (sign * scores[label].mean, label))
    letters = _letters(
        drawn, order, {frozenset((label, reference or "")) for label, p in corrected.items() if p < SIGNIFICANT}
    )
    ranks = dict(zip(ranked, drawn.ranks(ranked, higher_is_better), strict=True)) if len(ranked) > 1 else {}
    values = {label: _by_training_seed(mine, headline) for label, mine in runs.items()}
    return {
        label: Standing(
            score=scores[label],
            of_init=_spread(runs[label], headline, fixed=1),
            of_train=_spread(runs[label], headline, fixed=0),
            difference=differences.get(label),
            p=corrected.get(label),
            ranks=ranks.get(label),
            letters=letters.get(label, ""),
            verdict=_verdict(
                label,
                reference,
                scores[label].seeds,
                against.get(label),
                corrected.get(label),
                sign,
                _margin([values[label], values.get(reference or "", [])]),
            ),
        )
        for label in runs
    }


def with_all_parts(counting: Counting, headline: str) -> dict[str, dict[SeedPair, Record]]:
    """The runs whose headline score is the mean of as many scores as that of any; others do not compare."""
    most = max((parts_of(run, headline) for mine in counting.values() for run in mine.values()), default=(), key=len)
    found = {
        label: {seeds: run for seeds, run in sorted(mine.items()) if most and parts_of(run, headline) == most}
        for label, mine in counting.items()
    }
    return {label: mine for label, mine in found.items() if mine}


def parts_of(run: Record, headline: str) -> tuple[str, ...]:
    """The scores whose mean the headline score is; none where the run does not have it."""
    if headline not in run.headlines:
        return ()
    return tuple(sorted(f"{s.suite}/{s.dataset}/{s.metric}" for s in run.scores if s.headline == headline)) or (
        headline,
    )


@dataclass(frozen=True)
class Pair:
    """The difference of two strategies, first minus second, paired by seeds; p is Holm's over all pairs."""

    first: str
    second: str
    sure: Sure
    p: float | None


def compare_pairs(
    counting: Counting, headline: str, outcomes: Outcomes
) -> tuple[dict[frozenset[str], Pair], dict[str, float]]:
    """All pairs of strategies with three training seeds in common, and the mean of each strategy."""
    runs = with_all_parts(counting, headline)
    drawn = _Drawn(runs, headline, outcomes)
    means = {label: sure.mean for label in runs if (sure := drawn.sure(label)) is not None}
    return _pairs(drawn, list(runs)), means


def _pairs(drawn: _Drawn, labels: Sequence[str]) -> dict[frozenset[str], Pair]:
    found = {
        pair: sure
        for pair in itertools.combinations(labels, 2)
        if (sure := drawn.sure(*pair)) is not None and sure.seeds >= ENOUGH
    }
    corrected = _corrected({pair: sure.p for pair, sure in found.items()})
    return {frozenset(pair): Pair(*pair, sure, corrected.get(pair)) for pair, sure in found.items()}


def _corrected(p_values: Mapping[Any, float | None]) -> dict[Any, float]:
    """Holm's p-values of those that have one."""
    known = {key: p for key, p in p_values.items() if p is not None}
    return dict(zip(known, holm(list(known.values())), strict=True))


def _letters(drawn: _Drawn, order: Sequence[str], resolved: set[frozenset[str]]) -> dict[str, str]:
    """The letters of groups that cannot be told apart; `resolved`: pairs whose verdict says that they can.

    None where some pairs have no seeds in common, and for so many strategies that nobody could read them.
    """
    if len(order) > MOST:
        return {}
    pairs = _pairs(drawn, order)
    if len(pairs) < math.comb(len(order), 2):
        return {}
    return tied_groups(
        order, resolved | {pair for pair, each in pairs.items() if each.p is not None and each.p < SIGNIFICANT}
    )


def _verdict(
    label: str,
    reference: str | None,
    seeds: int,
    difference: Sure | None,
    p: float | None,
    sign: int,
    margin: float | None,
) -> str:
    if label == reference:
        return "reference"
    if seeds < ENOUGH:
        return "not yet ranked"
    if reference is None:
        return "no reference"
    if difference is None:
        return "too few common seeds"
    if p is not None and p < SIGNIFICANT:
        return "better" if sign * difference.mean < 0 else "worse"
    low, high = difference.interval or (-math.inf, math.inf)
    return "tied" if margin is not None and p is not None and max(-low, high) <= margin else "undecided"


class _Drawn:
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
            value_S, drawn_SB = self._by_seed(label, self.common(label, label))
            sure, drawn_B = of_seeds(value_S, drawn_SB), seed_draws(value_S, drawn_SB)
            wider = (sure.half_width or 0.0) / (Z * (sure.standard_error or 1.0)) or 1.0
            draws.append(sure.mean + wider * (drawn_B - sure.mean))
        return rank_intervals(np.array(draws), higher_is_better)

    def _by_seed(self, label: str, seeds: Sequence[SeedPair]) -> tuple[np.ndarray, np.ndarray | None]:
        """Values [S] and draws [S, B] of a strategy; initialisations of one training seed are averaged."""
        places: dict[int, list[int]] = defaultdict(list)
        for pair in seeds:
            places[pair[1]].append(self._place[label, pair])
        value_S = np.array([self._value_R[each].mean() for each in places.values()])
        if self._drawn_RB is None:
            return value_S, None
        return value_S, np.array([self._drawn_RB[each].mean(0) for each in places.values()])


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
    """The outcomes of a score, whose mean it is; None where the file has none such."""
    name = "correct@1" if score.metric == "acc1" else score.metric
    found = arrays.get(f"{score.suite}/{score.dataset}/{name}")
    if found is None or len(found) < 2:
        return None
    outcome_N = np.asarray(found, dtype=np.float64)
    if abs(outcome_N.mean() - score.value) > 1e-5 * max(1.0, abs(score.value)):
        return None
    alone = outcome_N.std(ddof=1) / math.sqrt(len(outcome_N))
    factor = score.standard_error / alone if score.standard_error and alone > 0 else 1.0
    return score.value + max(1.0, factor) * (outcome_N - outcome_N.mean())


def _by_training_seed(runs: Mapping[SeedPair, Record], headline: str) -> list[float]:
    values: dict[int, list[float]] = defaultdict(list)
    for (_, train), run in runs.items():
        values[train].append(run.headlines[headline].value)
    return [statistics.fmean(each) for each in values.values()]


def _margin(strategies: Sequence[Sequence[float]]) -> float | None:
    """One run's standard deviation over training seeds, pooled over strategies; None where none has two."""
    several = [values for values in strategies if len(values) > 1]
    if not several:
        return None
    squares = sum((len(values) - 1) * statistics.variance(values) for values in several)
    return math.sqrt(squares / sum(len(values) - 1 for values in several))


def _spread(runs: Mapping[SeedPair, Record], headline: str, fixed: int) -> float | None:
    """The standard deviation over one kind of seed with the other, number `fixed` of the pair, the same."""
    groups: dict[int, list[float]] = defaultdict(list)
    for seeds, run in runs.items():
        groups[seeds[fixed]].append(run.headlines[headline].value)
    return _margin(list(groups.values()))
