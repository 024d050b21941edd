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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upcycle_bench.record import Record
from upcycle_bench.reporting.comparable import Counting, SeedPair
from upcycle_bench.reporting.drawn import Drawn, Outcomes
from upcycle_bench.reporting.resampling import (
    ENOUGH,
    Sure,
    holm,
    tied_groups,
)

SIGNIFICANT = 0.05
MOST = 60  # strategies that get letters


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
    counting: Counting,
    headline: str,
    *,
    higher_is_better: bool,
    reference: str | Mapping[str, str] | None,
    outcomes: Outcomes,
) -> dict[str, Standing]:
    """The standing of each strategy that has the headline score. `reference`: one for all, or for each its own."""
    runs = with_all_parts(counting, headline)
    drawn = Drawn(runs, headline, outcomes)
    scores = {label: sure for label in runs if (sure := drawn.sure(label)) is not None}
    ranked = [label for label in runs if scores[label].seeds >= ENOUGH]
    peer = reference if isinstance(reference, Mapping) else dict.fromkeys(runs, reference)
    differences = {
        label: drawn.sure(label, other)
        for label in runs
        if (other := peer.get(label)) not in (None, label) and other in runs
    }
    against = {label: sure for label, sure in differences.items() if sure is not None and sure.seeds >= ENOUGH}
    corrected = _corrected({label: sure.p for label, sure in against.items()})
    sign = -1 if higher_is_better else 1
    order = sorted(ranked, key=lambda label: (sign * scores[label].mean, label))
    letters = _letters(
        drawn, order, {frozenset((label, peer[label] or "")) for label, p in corrected.items() if p < SIGNIFICANT}
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
                peer.get(label),
                scores[label].seeds,
                against.get(label),
                corrected.get(label),
                sign,
                _margin([values[label], values.get(peer.get(label) or "", [])]),
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
    drawn = Drawn(runs, headline, outcomes)
    means = {label: sure.mean for label in runs if (sure := drawn.sure(label)) is not None}
    return _pairs(drawn, list(runs)), means


def _pairs(drawn: Drawn, labels: Sequence[str]) -> dict[frozenset[str], Pair]:
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


def _letters(drawn: Drawn, order: Sequence[str], resolved: set[frozenset[str]]) -> dict[str, str]:
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
