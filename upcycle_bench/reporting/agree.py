"""How far our order of strategies agrees with a published one, over the pairs that both sides have resolved.

    for found in agreements(records, outcomes, published): print(found.agreeing, found.resolved, found.interval)

A published pair counts as resolved from POINTS on: papers give single runs, and DataComp reports about 0.2 points of
ImageNet between seeds. Two runs then differ by 0.28 points (0.2 by the square root of 2) as one standard deviation, so
that 0.5 points are 1.8 of them, or 2.5 of one run's. Our pair is resolved where p < 0.05, by Holm over all pairs.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from upcycle_bench.record import Record
from upcycle_bench.reporting.comparable import comparable, counting_runs, directions
from upcycle_bench.reporting.drawn import Outcomes
from upcycle_bench.reporting.published import PublishedRow
from upcycle_bench.reporting.standings import SIGNIFICANT, Pair, compare_pairs
from upcycle_bench.util.uncertainty import wilson

POINTS = 0.5
# Our headline -> published scores of the same kind, the first that a setting has.
COLUMNS: Mapping[str, Sequence[str]] = {
    "in-distribution": ("in_val",),
    "imagenet": ("in_val",),
    "shift": ("shift",),
}


@dataclass(frozen=True)
class PairOfBoth:
    """A pair of strategies: our difference, first minus second, better counting as positive, and the published one."""

    first: str
    second: str
    ours: float
    p: float | None
    published: float

    @property
    def resolved_by_us(self) -> bool:
        """Whether our runs tell the two apart."""
        return self.p is not None and self.p < SIGNIFICANT

    @property
    def resolved_there(self) -> bool:
        """Whether the published numbers do."""
        return abs(self.published) >= POINTS - 1e-9


@dataclass(frozen=True)
class Agreement:
    """One headline score beside one setting of a paper. tau: Kendall's tau-b of the means, None for equal ones."""

    protocol: str
    headline: str
    setting: str
    column: str
    citation: str
    strategies: tuple[str, ...]
    pairs: tuple[PairOfBoth, ...]
    tau: float | None

    @property
    def resolved(self) -> list[PairOfBoth]:
        """The pairs that both sides have resolved."""
        return [pair for pair in self.pairs if pair.resolved_by_us and pair.resolved_there]

    @property
    def agreeing(self) -> int:
        """How many of these have the same sign on both sides."""
        return sum(pair.ours * pair.published > 0 for pair in self.resolved)

    @property
    def disagreeing(self) -> list[PairOfBoth]:
        """The pairs about which both are sure, and say the opposite."""
        return [pair for pair in self.resolved if pair.ours * pair.published < 0]

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval of the share that agrees; pairs share strategies, so it is rather too narrow."""
        return wilson(self.agreeing / len(self.resolved), len(self.resolved)) if self.resolved else None


def agreements(records: Sequence[Record], outcomes: Outcomes, published: Sequence[PublishedRow]) -> list[Agreement]:
    """For each set of comparable runs of a closed division, headline score and setting with common strategies."""
    settings: dict[str, dict[str, PublishedRow]] = defaultdict(dict)
    for row in published:
        settings[row.setting].setdefault(row.strategy, row)
    found = []
    for runs in comparable(records):
        if runs[0].division != "closed":
            continue
        counting = counting_runs(runs)
        for headline, higher_is_better in directions(counting).items():
            pairs, means = compare_pairs(counting, headline, outcomes)
            for setting, rows in settings.items():
                columns = [
                    name for name in COLUMNS.get(headline, ()) if all(name in row.scores for row in rows.values())
                ]
                common = [label for label in means if label in rows]
                if not columns or len(common) < 2:
                    continue
                sign = 1 if higher_is_better else -1
                theirs = {label: rows[label].scores[columns[0]] for label in common}
                both = [
                    _pair(one, other, pairs, means, theirs, sign) for one, other in itertools.combinations(common, 2)
                ]
                found.append(
                    Agreement(
                        protocol=runs[0].protocol.name,
                        headline=headline,
                        setting=setting,
                        column=columns[0],
                        citation=rows[common[0]].citation,
                        strategies=tuple(common),
                        pairs=tuple(both),
                        tau=_tau([sign * means[label] for label in common], [theirs[label] for label in common]),
                    )
                )
    return found


def _pair(
    one: str, other: str, pairs: Mapping[frozenset[str], Pair], means: Mapping[str, float],
    theirs: Mapping[str, float], sign: int,
) -> PairOfBoth:  # fmt: skip
    known = pairs.get(frozenset((one, other)))
    difference = means[one] - means[other]
    if known is not None:  # paired by seeds
        difference = known.sure.mean if known.first == one else -known.sure.mean
    return PairOfBoth(one, other, sign * difference, known.p if known else None, theirs[one] - theirs[other])


def _tau(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    from scipy.stats import kendalltau

    value = float(kendalltau(ours, theirs).statistic)
    return None if math.isnan(value) else value
