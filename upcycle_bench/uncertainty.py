"""How sure a score is: standard error and 95 % interval over evaluation samples, the set and the gallery as they are.

    known = of_outcomes(correct_N)                 # bool: a share, with Wilson's interval; floats: a mean
    known = of_outcomes(correct_Q, image_Q)        # queries of one image count as one sample
    known = of_shares([right_P, ...], [word_P, ...])  # a mean over sets; equal names are one sample, across sets too
    known = of_recalls(correct_N, label_N)         # mean per-class recall
    known = of_mean([(score.value, score.standard_error, score.interval), ...])      # an average over sets

The usual interval of a share, p +- 1.96 sqrt(p (1 - p) / n), is empty at 0 and 1. Wilson's is not, nor are those made
of it. The standard error of a share of 0 or 1 stays 0, as its formula says: look at the interval.

Sources: E. B. Wilson, JASA 22, 1927 (interval); G. Y. Zou and A. Donner, Stat. Med. 27, 2008 (MOVER: the interval of a
sum from the intervals of its parts). Shape suffixes: N samples, G clusters, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # leaderboards come without it
    import numpy as np

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
Interval = tuple[float, float]


@dataclass(frozen=True)
class Uncertainty:
    """Of one number. None: it cannot be told, as of the mean of a single sample."""

    standard_error: float | None
    interval: Interval | None


def of_outcomes(outcome_N: np.ndarray, cluster_N: np.ndarray | None = None) -> Uncertainty:
    """Of the mean of outcomes: bool are shares. Samples with one number in `cluster_N` may depend on each other."""
    import numpy as np

    value_N = outcome_N.astype(np.float64)
    mean, samples = float(value_N.mean()), len(value_N)
    is_share = outcome_N.dtype == np.bool_
    if cluster_N is None or len(np.unique(cluster_N)) == samples:
        variance = mean * (1 - mean) if is_share else float(value_N.var(ddof=1)) if samples > 1 else math.nan
        error = math.sqrt(variance / samples)
        if is_share:
            return Uncertainty(error, wilson(mean, samples))
    elif is_share:
        return of_shares([value_N], [cluster_N])
    else:
        error = _clustered_error((value_N - mean) / samples, cluster_N)
    return Uncertainty(error, (mean - Z * error, mean + Z * error)) if math.isfinite(error) else Uncertainty(None, None)


def of_shares(shares: Sequence[np.ndarray], clusters: Sequence[np.ndarray]) -> Uncertainty:
    """Of the unweighted mean over sets of the means of their samples, each a number from 0 to 1 (a share, or bool).

    `clusters` holds a name for each sample. Samples of one name may depend on each other, in whatever set. Interval:
    Wilson's, of as many samples as would have this standard error, at most as many as there are; where the error is 0
    or, of a single cluster, cannot be told, of as many as there are clusters.
    """
    import numpy as np

    means = [float(share_N.mean()) for share_N in shares]
    mean = sum(means) / len(means)
    rest_N = [(share_N - own) / (len(share_N) * len(means)) for share_N, own in zip(shares, means, strict=True)]
    cluster_N = np.concatenate(clusters)
    error = _clustered_error(np.concatenate(rest_N), cluster_N)
    worth = mean * (1 - mean) / error**2 if error > 0 else len(np.unique(cluster_N))
    return Uncertainty(_known(error), wilson(mean, min(len(cluster_N), worth)))


def of_recalls(correct_N: np.ndarray, label_N: np.ndarray) -> Uncertainty:
    """Of the unweighted mean over the classes in `label_N` of the share of correct answers (bool [N]).

    Variance of a class with n samples: p (1 - p) / (n - 1), which has no bias; a class with one sample tells nothing of
    its own, so all those together stand for each of them. Interval: Wilson's, of as many samples as would have this
    standard error; where that is 0, of C^2 / sum(1 / n), which a mean with weights 1 / (C n) is worth (Kish).
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
    worth = mean * (1 - mean) / error**2 if error > 0 else len(count_C) ** 2 / float((1 / count_C).sum())
    return Uncertainty(error, wilson(mean, worth))


def of_mean(parts: Sequence[tuple[float, float | None, Interval | None]]) -> Uncertainty:
    """Of the unweighted mean of independent numbers, each (value, standard error, interval); None if one is unknown."""
    mean = sum(value for value, _, _ in parts) / len(parts)
    errors = [error for _, error, _ in parts if error is not None]
    error = math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None
    sides = [(value - interval[0], interval[1] - value) for value, _, interval in parts if interval is not None]
    if len(sides) < len(parts):
        return Uncertainty(error, None)
    below, above = (math.hypot(*side) / len(parts) for side in zip(*sides, strict=True))
    return Uncertainty(error, (mean - below, mean + above))


def of_scores(parts: Iterable[tuple[str, str, float | None]]) -> float | None:
    """Standard error of the mean of scores, each (dataset, metric, standard error), at most; None if one is unknown.

    Scores of one metric and different sets are independent. Scores of one set may be of the same images, be it other
    metrics or other shots (`digits/1-shot`, `digits/all`: the set is what stands before the first "/"), and so may
    different metrics: these are taken to go up and down together, which gives the largest error.
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
    """95 % interval of a share of that many samples, within 0 and 1."""
    square = Z**2 / samples
    middle = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / samples + square / (4 * samples)) / (1 + square)
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def _clustered_error(rest_N: np.ndarray, cluster_N: np.ndarray) -> float:
    """sqrt(G / (G - 1) sum over clusters of (their sum)^2), of residuals times weights; NaN of a single cluster."""
    import numpy as np

    _, group_N = np.unique(cluster_N, return_inverse=True)
    sum_G = np.bincount(group_N, weights=rest_N)
    clusters = len(sum_G)
    return math.sqrt(clusters / (clusters - 1) * float(sum_G @ sum_G)) if clusters > 1 else math.nan


def _known(error: float) -> float | None:
    return error if math.isfinite(error) else None
