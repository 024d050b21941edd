"""How sure a mean over seeds and samples is, and a difference of two such means: a hierarchical bootstrap.

    drawn_RB = sample_draws([(outcome_RN, 0.5), ...])       # each run's weighted mean over sets, under draws of samples
    sure = of_seeds(value_S, drawn_SB)                      # of the runs of one strategy, or of differences of pairs
    sure.mean, sure.interval, sure.p                        # p: of the hypothesis that the mean is 0

Seeds are drawn first, then samples; all runs share a draw of samples, since they were scored on the same ones. Few
seeds drawn with replacement vary less than new ones would, by (S - 1) / S in variance: deviations of seeds are enlarged
by as much. What the draws of seeds contribute to the standard error has a closed form then, and holds what a seed does
to single samples, too. What the samples do to all seeds alike is drawn (`common_spread`). The interval is Student's,
with degrees of freedom by Satterthwaite: those of the seeds, unless the samples contribute most. Without outcomes of
samples only the seeds count.

Sources: B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993 (ch. 6, 8); F. E. Satterthwaite, Biometrics
Bull. 2, 1946; R. Agarwal et al., arXiv:2108.13264 (few runs of a benchmark).

Shape suffixes: R runs, N samples of a set, S training seeds, B draws, L strategies.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
ENOUGH = 3  # seeds, below which nothing is ranked
LEVEL = 0.95
MANY = 1000  # samples
DIGITS = 6  # significant ones of what is drawn: kernels of other machines round the rest differently
MOST_GROUPS = len(string.ascii_letters)


@dataclass(frozen=True)
class Sure:
    """A mean over `seeds` training seeds. Errors are of that mean.

    standard_error: of seeds and samples together; None for one seed. of_seeds, of_samples: the parts; None where they
    are unknown. degrees: of freedom.
    """

    mean: float
    seeds: int
    standard_error: float | None = None
    of_seeds: float | None = None
    of_samples: float | None = None
    degrees: float | None = None

    @property
    def spread(self) -> float | None:
        """The standard deviation over training seeds; None for one seed."""
        return None if self.of_seeds is None else self.of_seeds * math.sqrt(self.seeds)

    @property
    def half_width(self) -> float | None:
        """Of the 95 % interval; None for one seed."""
        if self.standard_error is None:
            return None
        return _quantile(self.degrees) * self.standard_error

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %; None for one seed."""
        half = self.half_width
        return None if half is None else (self.mean - half, self.mean + half)

    @property
    def p(self) -> float | None:
        """Two-sided, of the hypothesis that the mean is 0; None for one seed, and for seeds that are all equal.

        Equal numbers, as coarse ones may be, do not tell how much others would differ.
        """
        if not self.standard_error:
            return None
        from scipy.special import stdtr  # the distribution of Student's t

        return float(2 * stdtr(self.degrees, -abs(self.mean) / self.standard_error))


def sample_draws(sets: Sequence[tuple[np.ndarray, float]], draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """The weighted sum over sets of each run's mean over samples, [R, B], under draws of the samples with replacement.

    `sets` holds an array [R, N] of outcomes and a weight for each set. Several questions about the same samples are one
    array, of their mean. The draws of two sets are independent.
    """
    total = np.zeros((len(sets[0][0]), draws))
    for number, (outcome_RN, weight) in enumerate(sets):
        generator = np.random.default_rng((seed, number))
        samples = outcome_RN.shape[1]
        chunk = max(1, (1 << 24) // samples)  # draws at a time: 64 MB
        for first in range(0, draws, chunk):
            count = min(chunk, draws - first)
            if samples < MANY:
                weight_BN = generator.multinomial(samples, np.full(samples, 1 / samples), count).astype(np.float32)
            else:  # independent counts: faster, and nearly the same
                weight_BN = generator.poisson(1.0, (count, samples)).astype(np.float32)
            weight_BN /= weight_BN.sum(1, keepdims=True)
            centre_R = outcome_RN.mean(1, dtype=np.float64)
            rest_RN = (outcome_RN - centre_R[:, None]).astype(np.float32)
            total[:, first : first + count] += weight * (centre_R[:, None] + rest_RN @ weight_BN.T)
    return total


def of_seeds(value_S: np.ndarray, drawn_SB: np.ndarray | None = None) -> Sure:
    """How sure the mean of one number a training seed is.

    `drawn_SB`: the same numbers under draws of the samples, whose spread is that of the samples; None: it is unknown.
    """
    seeds, mean = len(value_S), float(np.mean(value_S))
    of_samples = None if drawn_SB is None else float(f"{common_spread(drawn_SB):.{DIGITS}g}")
    if seeds == 1:
        return Sure(mean, 1, of_samples=of_samples)
    of_seeds = float(np.std(value_S, ddof=1)) / math.sqrt(seeds)
    error = math.hypot(of_seeds, of_samples or 0.0)
    degrees = (seeds - 1) * (error / of_seeds) ** 4 if of_seeds > 0 else math.inf
    return Sure(mean, seeds, error, of_seeds, of_samples, degrees)


def common_spread(drawn_SB: np.ndarray) -> float:
    """The standard error that draws of the samples give the mean over all seeds alike.

    V1 = the mean of the seeds' variances = common + own, VS = the variance of their mean = common + own / S. What is
    own to a seed and a sample is in the variation of the seeds already. One seed cannot tell the two apart.
    """
    seeds = len(drawn_SB)
    of_mean = float(drawn_SB.mean(0).var())
    if seeds == 1:
        return math.sqrt(of_mean)
    each = float(drawn_SB.var(1).mean())
    return math.sqrt(max(0.0, of_mean - (each - of_mean) / (seeds - 1)))


def seed_draws(
    value_S: np.ndarray, drawn_SB: np.ndarray | None = None, draws: int = DRAWS, key: Sequence[int] = ()
) -> np.ndarray:
    """The mean of one number a training seed, [B], under draws of the seeds, and of the samples where they are given.

    key: the training seeds. Strategies with the same ones have the same draws of them, others have draws of their own.
    """
    seeds = len(value_S)
    draws = draws if drawn_SB is None else drawn_SB.shape[1]
    weight_BS = np.random.default_rng((seeds, *key)).multinomial(seeds, [1 / seeds] * seeds, draws) / seeds
    enlarged_S = (value_S - np.mean(value_S)) * math.sqrt(seeds / max(1, seeds - 1))
    moved_B = weight_BS @ enlarged_S
    if drawn_SB is not None:
        common_B = drawn_SB.mean(0) - drawn_SB.mean()
        spread = float(common_B.std())
        moved_B = moved_B + common_B * (common_spread(drawn_SB) / spread if spread else 0.0)
    return np.mean(value_S) + moved_B


def rank_intervals(draws_LB: np.ndarray, higher_is_better: bool) -> list[tuple[int, int]]:
    """The 95 % interval of each strategy's rank, 1 the best, under common draws of all strategies' means."""
    signed_LB = -draws_LB if higher_is_better else draws_LB
    sorted_LB = np.sort(signed_LB, axis=0)
    rank_LB = np.array([1 + (sorted_LB < each_B).sum(0) for each_B in signed_LB])
    low_L, high_L = np.quantile(rank_LB, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1, method="closest_observation")
    return [(int(low), int(high)) for low, high in zip(low_L, high_L, strict=True)]


def holm(p: Sequence[float]) -> list[float]:
    """p-values that hold for all hypotheses together (S. Holm, Scand. J. Stat. 6, 1979)."""
    if not p:
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(each) for each in multipletests(p, method="holm")[1]]


def tied_groups(order: Sequence[str], differ: Collection[frozenset[str]]) -> dict[str, str]:
    """The letters of each name: two names share one if and only if they do not `differ`.

    `order`: the names, best first; the first has the letter a. A letter is a maximal group of names of which no two
    differ, as in a compact letter display (H.-P. Piepho, J. Comput. Graph. Stat. 13, 2004). No letters where there
    are not enough of them: nobody could read such a table.
    """
    import networkx

    tied = networkx.Graph()
    tied.add_nodes_from(order)
    tied.add_edges_from(pair for pair in itertools.combinations(order, 2) if frozenset(pair) not in differ)
    found = [*itertools.islice(networkx.find_cliques(tied), MOST_GROUPS + 1)]
    if len(found) > MOST_GROUPS:
        return dict.fromkeys(order, "")
    place = {name: number for number, name in enumerate(order)}
    groups = sorted(sorted(place[name] for name in group) for group in found)
    letters = dict.fromkeys(order, "")
    for number, group in enumerate(groups):
        for member in group:
            letters[order[member]] += string.ascii_letters[number]
    return letters


def _quantile(degrees: float | None) -> float:
    from scipy.special import ndtri, stdtrit

    upper = (1 + LEVEL) / 2
    return float(ndtri(upper) if degrees is None or math.isinf(degrees) else stdtrit(degrees, upper))
