"""Which strategies differ in rank over training seeds: the numbers of a critical-difference diagram.

    found = ranking_of(counting, "shift", higher_is_better=False)
    found.ranks             # {"cluster-aware": 1.3, "sparse-upcycling": 2.0, "dense": 2.7}, the best first
    found.groups            # (("cluster-aware", "sparse-upcycling"), ...): of each, no two can be told apart

In each block the strategies have ranks. Friedman's test asks whether their means differ at all; Nemenyi's critical
difference is how far apart two means must be. Demsar's blocks are data sets, on each of which is trained anew. Here one
training is scored on all sets, which therefore rise and fall together: as blocks they would find differences between
equal strategies in most tables, as `tests/reporting/test_critical_difference.py` shows. So a block is a training seed,
and its value the headline score, the mean over its sets; initialisations of one seed are averaged.

Sources: J. Demsar, JMLR 7, 2006; M. Friedman, JASA 32, 1937; P. Nemenyi, Distribution-free multiple comparisons, 1963.
Shape suffixes: S training seeds (blocks), L strategies.
"""

from __future__ import annotations

import math
import statistics
import string
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from upcycle_bench.record import Record
from upcycle_bench.reporting.comparable import Counting, SeedPair, directions
from upcycle_bench.reporting.resampling import ENOUGH, MOST_GROUPS
from upcycle_bench.reporting.standings import SIGNIFICANT, with_all_parts
from upcycle_bench.util.errors import UserError

FEWEST = 3  # strategies
NAMED, LETTERS = 6, 40  # strategies that are left out, by name; letters of a name there


@dataclass(frozen=True)
class Ranking:
    """Strategies by mean rank, 1 the best, over `seeds`.

    statistic, p: Friedman's, of the hypothesis that the strategies are equal. distance: Nemenyi's critical difference
    of two mean ranks at 5 %. groups: maximal ones of two and more strategies of which no two can be told apart, the
    best first; one of all where p is not below 0.05. left_out: strategies, and why.
    """

    ranks: dict[str, float]
    seeds: tuple[int, ...]
    statistic: float
    p: float
    distance: float
    groups: tuple[tuple[str, ...], ...]
    left_out: dict[str, str]

    def letters(self, label: str) -> str:
        """The groups of a strategy, a the best; none where it can be told from all others, or for too many groups."""
        if len(self.groups) > MOST_GROUPS:
            return ""
        return "".join(
            letter for letter, group in zip(string.ascii_letters, self.groups, strict=False) if label in group
        )

    def said(self) -> str:
        """What the diagram shows and how, in words."""
        if self.p < SIGNIFICANT:
            joined = "A bar joins strategies that Nemenyi's test cannot tell apart (5 %)"
        else:
            joined = "Friedman's test finds no difference, so one bar joins all"
        left_out = [
            f"{label if len(label) <= LETTERS else label[: LETTERS - 1] + '…'} ({why})"
            for label, why in [*self.left_out.items()][:NAMED]
        ]
        if len(self.left_out) > NAMED:
            left_out.append(f"and {len(self.left_out) - NAMED} more")
        return (
            f"Mean ranks of {len(self.ranks)} strategies over {len(self.seeds)} training seeds, 1 is the best. "
            f"{joined}; the critical difference is {self.distance:.2f}. Friedman: chi-squared {self.statistic:.2f}, "
            f"p = {self.p:.2g}. One training is scored on all sets, so the blocks are seeds and not sets."
            + (f" Left out: {', '.join(left_out)}." if left_out else "")
        )


def rankings(counting: Counting) -> dict[str, Ranking | str]:
    """Of each headline score of comparable runs the ranking, or the line that says what it lacks."""
    found: dict[str, Ranking | str] = {}
    for headline, higher_is_better in directions(counting).items():
        try:
            found[headline] = ranking_of(counting, headline, higher_is_better)
        except UserError as error:
            found[headline] = str(error)
    return found


def ranking_of(counting: Counting, headline: str, higher_is_better: bool) -> Ranking:
    """The ranking by a headline score of the strategies that have three training seeds in common.

    UserError, one line, where fewer than three strategies have.
    """
    values = {label: _by_seed(runs, headline) for label, runs in with_all_parts(counting, headline).items()}
    left_out = {
        label: f"{len(values.get(label, ()))} of {ENOUGH} training seeds"
        for label in sorted(counting)
        if len(values.get(label, ())) < ENOUGH
    }
    labels = [label for label in values if label not in left_out]
    while len(labels) >= FEWEST and len(_common(values, labels)) < ENOUGH:  # leave out the one that spoils most
        odd = max(labels, key=lambda label: (len(_common(values, {*labels} - {label})), -len(values[label]), label))
        labels.remove(odd)
        left_out[odd] = "other training seeds"
    if len(labels) < FEWEST:
        raise UserError(
            f"{headline}: a critical-difference diagram needs {FEWEST} strategies with {ENOUGH} training seeds in "
            f"common; of {len(counting)} here {len(labels)} have them. Run more: upcycle-bench run -s ... "
            f"--seeds {ENOUGH}"
        )
    seeds = sorted(_common(values, labels))
    value_SL = np.array([[values[label][seed] for label in labels] for seed in seeds])
    return rank(-value_SL if higher_is_better else value_SL, labels, seeds, left_out)


def rank(
    value_SL: np.ndarray, labels: Sequence[str], seeds: Sequence[int], left_out: Mapping[str, str] | None = None
) -> Ranking:
    """The ranking of strategies by values of which lower is better; three strategies and two blocks are the fewest."""
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    blocks, strategies = value_SL.shape
    rank_L = rankdata(value_SL, axis=1).mean(axis=0)
    statistic, p = 0.0, 1.0
    if np.ptp(value_SL, axis=1).any():  # else all are equal in every block, and the statistic is 0 / 0
        statistic, p = map(float, friedmanchisquare(*value_SL.T))
    quantile = float(studentized_range.ppf(1 - SIGNIFICANT, strategies, math.inf))
    distance = quantile * math.sqrt(strategies * (strategies + 1) / (12 * blocks))
    order = sorted(range(strategies), key=lambda place: (rank_L[place], labels[place]))
    ranks = {labels[place]: float(rank_L[place]) for place in order}
    groups = _groups(ranks, distance) if p < SIGNIFICANT else (tuple(ranks),)
    return Ranking(ranks, tuple(seeds), statistic, p, distance, groups, dict(left_out or {}))


def _groups(ranks: Mapping[str, float], distance: float) -> tuple[tuple[str, ...], ...]:
    """Neighbours within the distance, as many as possible; `ranks` ascend."""
    found: list[tuple[str, ...]] = []
    for first, low in enumerate(ranks.values()):
        group = tuple(label for label, each in [*ranks.items()][first:] if each - low <= distance)
        if len(group) > 1 and not (found and {*group} <= {*found[-1]}):
            found.append(group)
    return tuple(found)


def _by_seed(runs: Mapping[SeedPair, Record], headline: str) -> dict[int, float]:
    """The headline score of each training seed; its initialisations are averaged."""
    values: dict[int, list[float]] = defaultdict(list)
    for (_, train), run in runs.items():
        values[train].append(run.headlines[headline].value)
    return {seed: statistics.fmean(each) for seed, each in values.items()}


def _common(values: Mapping[str, Mapping[int, float]], labels: Collection[str]) -> set[int]:
    """The training seeds that all of these have."""
    return set.intersection(*(set(values[label]) for label in labels))
