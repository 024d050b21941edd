"""Standard errors and 95 % intervals of scores, over the evaluation samples. Sets and galleries are taken as fixed.

    known = of_outcomes(correct_N)                 # bool: a share, with Wilson's interval; floats: a mean
    known = of_outcomes(correct_N, image_N)        # the queries of one image count as one sample
    known = of_shares([right_N, ...], [word_N, ...])  # a mean over sets; one name is one sample, also across sets
    known = of_recalls(correct_N, label_N)         # the mean recall of the classes
    known = of_mean([(score.value, score.standard_error, score.interval), ...])      # an average over sets

The usual interval of a share p of n samples, p +- 1.96 sqrt(p (1 - p) / n), is empty at 0 and 1. Wilson's is not. The
standard error of a share of 0 or 1 is 0 by its formula, so only the interval says how sure such a share is.

Sources: E. B. Wilson, JASA 22, 1927 (interval); G. Y. Zou and A. Donner, Stat. Med. 27, 2008 (MOVER: the interval of a
sum from the intervals of its parts); L. Kish, Survey Sampling, 1965 (effective number of samples).

Shape suffixes: N samples, G clusters, Y classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the leaderboard needs only `of_scores`, and starts faster without numpy
    import numpy as np

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
Interval = tuple[float, float]


@dataclass(frozen=True)
class Uncertainty:
    """How sure one number is. None means unknown, as for the mean of a single sample."""

    standard_error: float | None
    interval: Interval | None


def of_outcomes(outcome_N: np.ndarray, cluster_N: np.ndarray | None = None) -> Uncertainty:
    """How sure the mean of outcomes is; the mean of bools is a share.

    Samples with the same number in `cluster_N` may depend on each other.
    """
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
    """How sure the unweighted mean of the sets' means is.

    `shares` holds one array [N] a set, of bools or numbers from 0 to 1. `clusters` holds one array [N] a set, of names;
    samples of one name may depend on each other, even in different sets. The interval is Wilson's for the effective
    number of samples, which is the number of independent samples with this standard error. That is at most the number
    of samples. Where the error is 0 or unknown, it is the number of clusters.
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
    """How sure the mean recall is: the unweighted mean over the classes in `label_N` of the share of correct answers.

    `correct_N` is bool. A class with n samples and recall p has the unbiased variance p (1 - p) / (n - 1). A class with
    one sample has no such estimate, and gets p (1 - p) of all classes with one sample together. The interval is
    Wilson's for the effective number of samples, as in `of_shares`. Where the error is 0, that number is
    Y^2 / sum(1 / n), for weights 1 / (Y n) (Kish).
    """
    import numpy as np

    _, class_N, count_Y = np.unique(label_N, return_inverse=True, return_counts=True)
    recall_Y = np.bincount(class_N, weights=correct_N) / count_Y
    alone_Y = count_Y == 1
    pooled = float(recall_Y[alone_Y].mean()) if alone_Y.any() else 0.0
    spread_Y = recall_Y * (1 - recall_Y) / np.maximum(count_Y - 1, 1)
    variance_Y = np.where(alone_Y, pooled * (1 - pooled), spread_Y)
    error = math.sqrt(variance_Y.sum()) / len(count_Y)
    mean = float(recall_Y.mean())
    effective = mean * (1 - mean) / error**2 if error > 0 else len(count_Y) ** 2 / float((1 / count_Y).sum())
    return Uncertainty(error, wilson(mean, effective))


def of_mean(parts: Sequence[tuple[float, float | None, Interval | None]]) -> Uncertainty:
    """How sure the unweighted mean of independent numbers (value, standard error, interval) is.

    A standard error or interval is None where a part's is.
    """
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

    Scores of one metric on different sets are independent. All other scores may share images: those of different
    metrics, and those of one set with other shots (`digits/1-shot`, `digits/all`; the set is the part before the first
    "/"). They are taken as perfectly correlated, which gives the largest error.
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
    """95 % interval of a share of `samples` samples, which need not be a whole number. `share` lies in the interval."""
    from statsmodels.stats.proportion import proportion_confint  # imports pandas and scipy.stats, about a second

    low, high = proportion_confint(share * samples, samples, method="wilson")
    return max(0.0, min(share, low)), min(
        1.0, max(share, high)
    )  # at a share of 0 or 1, rounding can put an end on its wrong side


def _clustered_error(rest_N: np.ndarray, cluster_N: np.ndarray) -> float:
    """Cluster-robust standard error of a weighted mean; NaN for a single cluster.

    `rest_N` are residuals times weights. sqrt(G / (G - 1) * sum over clusters of (the sum in the cluster)^2)
    """
    import numpy as np

    _, group_N = np.unique(cluster_N, return_inverse=True)
    sum_G = np.bincount(group_N, weights=rest_N)
    clusters = len(sum_G)
    return math.sqrt(clusters / (clusters - 1) * float(sum_G @ sum_G)) if clusters > 1 else math.nan
