"""How sure a score is: its standard error and 95 % interval over the evaluation samples. Set and gallery stay as given.

    known = of_outcomes(correct_N)                 # bool: a share, with Wilson's interval; floats: a mean
    known = of_outcomes(correct_N, image_N)        # the queries of one image count as one sample
    known = of_shares([right_N, ...], [word_N, ...])  # a mean over sets; one name is one sample, across sets too
    known = of_recalls(correct_N, label_N)         # mean per-class recall
    known = of_mean([(score.value, score.standard_error, score.interval), ...])      # an average over sets

The usual interval of a share, p +- 1.96 sqrt(p (1 - p) / n), is empty at 0 and 1. Wilson's is not. The standard
error of a share of 0 or 1 stays 0, as its formula says: look at the interval.

Sources: E. B. Wilson, JASA 22, 1927 (interval); G. Y. Zou and A. Donner, Stat. Med. 27, 2008 (MOVER: the interval of a
sum from the intervals of its parts); L. Kish, Survey Sampling, 1965 (effective number of samples). Shape suffixes:
N samples, G clusters, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the leaderboard needs `of_scores` alone, and starts faster without numpy
    import numpy as np

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
Interval = tuple[float, float]


@dataclass(frozen=True)
class Uncertainty:
    """Of one number. None: unknown, as for the mean of a single sample."""

    standard_error: float | None
    interval: Interval | None


def of_outcomes(outcome_N: np.ndarray, cluster_N: np.ndarray | None = None) -> Uncertainty:
    """Of the mean of outcomes; bool outcomes are a share. Samples of one number in `cluster_N` may be dependent."""
    import numpy as np

    value_N = outcome_N.astype(np.float64)
    mean, samples = float(value_N.mean()), len(value_N)
    is_share = outcome_N.dtype == np.bool_
    if cluster_N is not None and len(np.unique(cluster_N)) == samples:
        cluster_N = None  # every sample is its own cluster
    if is_share and cluster_N is not None:
        return of_shares([value_N], [cluster_N])
    if is_share:
        return Uncertainty(math.sqrt(mean * (1 - mean) / samples), wilson(mean, samples))
    if cluster_N is not None:
        error = _clustered_error((value_N - mean) / samples, cluster_N)
    else:
        error = math.sqrt(float(value_N.var(ddof=1)) / samples) if samples > 1 else math.nan
    return Uncertainty(error, (mean - Z * error, mean + Z * error)) if math.isfinite(error) else Uncertainty(None, None)


def of_shares(shares: Sequence[np.ndarray], clusters: Sequence[np.ndarray]) -> Uncertainty:
    """Of the unweighted mean over sets of each set's mean. A sample [N] is a number from 0 to 1 (a share, or bool).

    `clusters` names each sample's cluster [N]; samples of one name may be dependent, even in different sets.
    The interval is Wilson's for the effective number of samples: as many independent ones would have this standard
    error. It is at most the number of samples, and the number of clusters where the error is 0 or unknown.
    """
    import numpy as np

    means = [float(share_N.mean()) for share_N in shares]
    mean = sum(means) / len(means)
    rest_N = [(share_N - own) / (len(share_N) * len(means)) for share_N, own in zip(shares, means, strict=True)]
    cluster_N = np.concatenate(clusters)
    error = _clustered_error(np.concatenate(rest_N), cluster_N)
    effective = mean * (1 - mean) / error**2 if error > 0 else len(np.unique(cluster_N))
    return Uncertainty(error if math.isfinite(error) else None, wilson(mean, min(len(cluster_N), effective)))


def of_recalls(correct_N: np.ndarray, label_N: np.ndarray) -> Uncertainty:
    """Of the unweighted mean, over the classes in `label_N`, of the share of correct answers (bool [N]).

    A class with n samples has the unbiased variance p (1 - p) / (n - 1). A class with one sample has no variance of its
    own; all such classes together give theirs. The interval is Wilson's for the effective number of samples: as many
    would have this standard error. Where that is 0, it is C^2 / sum(1 / n), for weights 1 / (C n) (Kish).
    """
    import numpy as np

    _, class_N, count_C = np.unique(label_N, return_inverse=True, return_counts=True)
    recall_C = np.bincount(class_N, weights=correct_N) / count_C
    alone_C = count_C == 1
    pooled = float(recall_C[alone_C].mean()) if alone_C.any() else 0.0
    spread_C = recall_C * (1 - recall_C) / np.maximum(count_C - 1, 1)
    variance_C = np.where(alone_C, pooled * (1 - pooled), spread_C)
    error = math.sqrt(variance_C.sum()) / len(count_C)
    mean = float(recall_C.mean())
    effective = mean * (1 - mean) / error**2 if error > 0 else len(count_C) ** 2 / float((1 / count_C).sum())
    return Uncertainty(error, wilson(mean, effective))


def of_mean(parts: Sequence[tuple[float, float | None, Interval | None]]) -> Uncertainty:
    """Of the unweighted mean of independent numbers (value, standard error, interval); None where a part is unknown."""
    mean = sum(value for value, _, _ in parts) / len(parts)
    errors = [error for _, error, _ in parts if error is not None]
    error = math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None
    sides = [(value - interval[0], interval[1] - value) for value, _, interval in parts if interval is not None]
    if len(sides) < len(parts):
        return Uncertainty(error, None)
    below, above = (math.hypot(*side) / len(parts) for side in zip(*sides, strict=True))
    return Uncertainty(error, (mean - below, mean + above))


def of_scores(parts: Iterable[tuple[str, str, float | None]]) -> float | None:
    """Upper bound of the standard error of a mean of scores (dataset, metric, standard error); None if one is unknown.

    Scores of one metric on different sets are independent. Scores of one set may share images, as other metrics or
    other shots (`digits/1-shot`, `digits/all`: the set is the part before the first "/"), and so may different metrics.
    Those are assumed to be perfectly correlated, which gives the largest error.
    """
    of_metric: dict[str, dict[str, float]] = {}
    count = 0
    for dataset, metric, error in parts:
        if error is None:
            return None
        of_set = of_metric.setdefault(metric, {})
        samples = dataset.partition("/")[0]
        of_set[samples] = of_set.get(samples, 0.0) + error
        count += 1
    return sum(math.hypot(*of_set.values()) for of_set in of_metric.values()) / count if count else None


def wilson(share: float, samples: float) -> Interval:
    """95 % interval of a share of that many samples (need not be whole); within 0 and 1, and `share` is in it."""
    from statsmodels.stats.proportion import proportion_confint  # imports pandas and scipy.stats, about a second

    low, high = proportion_confint(share * samples, samples, method="wilson")
    return min(share, low), max(share, high)  # rounding may leave an end at 0 or 1 on the wrong side of the share


def _clustered_error(rest_N: np.ndarray, cluster_N: np.ndarray) -> float:
    """Cluster-robust standard error of a weighted mean, from residuals times weights; NaN for a single cluster.

    sqrt(G / (G - 1) * sum over clusters of (the sum in the cluster)^2)
    """
    import numpy as np

    _, group_N = np.unique(cluster_N, return_inverse=True)
    sum_G = np.bincount(group_N, weights=rest_N)
    clusters = len(sum_G)
    return math.sqrt(clusters / (clusters - 1) * float(sum_G @ sum_G)) if clusters > 1 else math.nan
