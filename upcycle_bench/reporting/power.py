"""Which differences the present seeds can detect, and how many seeds a difference needs.

    found = detectable(board, "shift", difference=0.02)     # see `Power`
    smallest(spread, samples, seeds=3)          # the smallest difference that is found with a chance of 80 %
    needed(spread, samples, difference=0.02)    # training seeds

A paired difference has the standard error sqrt(spread^2 / seeds + samples^2): `spread` over training seeds, `samples`
of the evaluation set, which more seeds do not make smaller. Found means p < 0.05 in a two-sided t test with degrees of
freedom by Satterthwaite; `tests` is the number of strategies among which Holm's correction asks most of the first. The
chance is that of the noncentral t distribution (J. Cohen, Statistical Power Analysis, 1988).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from upcycle_bench.reporting.board import Board
from upcycle_bench.reporting.resampling import ENOUGH
from upcycle_bench.util.errors import UserError

CHANCE = 0.8
MOST = 1000  # seeds
SIGNIFICANT = 0.05
QUANTILES = 4000


@dataclass(frozen=True)
class PowerRow:
    """One strategy: its seeds in common with the reference, its difference, and the smallest that they can detect."""

    label: str
    seeds: int
    difference: float
    smallest: float | None
    needed: int | None  # seeds, for the difference that was asked for, else for its own
    hidden: bool  # whether the samples hide that difference, however many seeds there are


@dataclass(frozen=True)
class Power:
    """Of one headline score: what its differences to the reference vary by over seeds, pooled, and over samples."""

    protocol: str
    headline: str
    reference: str
    spread: float
    samples: float
    tests: int
    asked: float | None
    rows: tuple[PowerRow, ...]


def detectable(board: Board, headline: str, difference: float | None = None) -> Power:
    """What the seeds of a board can detect in a headline score, and which ones would be needed.

    UserError where no strategy and the reference have two training seeds in common.
    """
    found = [(row.label, each) for row in board.rows if (each := row.headlines.get(headline)) and each.difference]
    several = [(each.spread, each.difference.n) for _, each in found if each.difference and each.spread is not None]
    if not board.baseline or not several:
        raise UserError(
            f"{board.protocol}: power needs a strategy and a reference ({board.baseline or 'sparse-upcycling'}) with "
            "two training seeds in common; run more: upcycle-bench run -s ... --seeds 3"
        )
    spread = math.sqrt(sum((n - 1) * each**2 for each, n in several) / sum(n - 1 for _, n in several))
    samples = max((each.samples or 0.0 for _, each in found), default=0.0)
    tests = len(found)
    rows = []
    for label, each in found:
        assert each.difference is not None
        own = each.difference
        wanted = abs(own.mean) if difference is None else difference
        rows.append(
            PowerRow(
                label,
                own.n,
                own.mean,
                smallest(spread, samples, own.n, tests),
                needed(spread, samples, wanted, tests) if wanted else None,
                bool(wanted) and chance_to_find(wanted, 0.0, samples, MOST, tests) < CHANCE,
            )
        )
    return Power(board.protocol, headline, board.baseline, spread, samples, tests, difference, tuple(rows))


def chance_to_find(difference: float, spread: float, samples: float, seeds: int, tests: int = 1) -> float:
    """The chance that a true difference is found with so many seeds, from 0 to 1."""
    import numpy as np
    from scipy.special import gammaincinv, ndtr, stdtrit

    error = math.hypot(spread / math.sqrt(seeds), samples)
    if error == 0:
        return 1.0 if difference else 0.0
    degrees = min((seeds - 1) * (error * math.sqrt(seeds) / spread) ** 4, 1e6) if spread else 1e6
    critical, centre = stdtrit(degrees, 1 - SIGNIFICANT / tests / 2), abs(difference) / error
    # The mean over what the estimated error may be, quantiles of chi-squared by its degrees: scipy's nct gives NaN.
    estimated = np.sqrt(2 * gammaincinv(degrees / 2, (np.arange(QUANTILES) + 0.5) / QUANTILES) / degrees)
    return float((ndtr(centre - critical * estimated) + ndtr(-centre - critical * estimated)).mean())


def smallest(spread: float, samples: float, seeds: int, tests: int = 1) -> float | None:
    """The smallest difference that is found with the chance CHANCE; None with one seed."""
    from scipy.optimize import brentq

    error = math.hypot(spread / math.sqrt(seeds), samples)
    if seeds < 2:
        return None
    if error == 0:
        return 0.0
    high = error
    while chance_to_find(high, spread, samples, seeds, tests) < CHANCE:
        high *= 2
    return float(brentq(lambda each: chance_to_find(each, spread, samples, seeds, tests) - CHANCE, 0.0, high))


def needed(spread: float, samples: float, difference: float, tests: int = 1) -> int | None:
    """The fewest training seeds, from ENOUGH on, with which a difference is found with the chance CHANCE.

    None where more than MOST would be needed, such as for a difference that the samples hide.
    """
    if chance_to_find(difference, spread, samples, MOST, tests) < CHANCE:
        return None
    low, high = ENOUGH, MOST  # the chance grows with the seeds
    while low < high:
        middle = (low + high) // 2
        enough = chance_to_find(difference, spread, samples, middle, tests) >= CHANCE
        low, high = (low, middle) if enough else (middle + 1, high)
    return low
