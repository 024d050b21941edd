"""Average precision of each class of a multilabel set, as CLIP_benchmark defines it, and the value of guessing.

    precision_Y = average_precisions(cosine_NY, label_NY)         # label_NY: True where the image shows the class
    mean = precision_Y.mean()                                     # CLIP_benchmark's mean_average_precision

The images are ranked by their score for a class, ties in the order of the set. The average precision of the class is a
mean over the images that show it: of the share of such images among all from the first to that one. A class that no
image shows has 0, which counts in the mean over classes.

Source: clip_benchmark.metrics.zeroshot_classification.average_precision_per_class (1.6.2).
Shape suffixes: N images, Y classes.
"""

from __future__ import annotations

import numpy as np

from upcycle_bench.util.uncertainty import Uncertainty, Z


def average_precisions(score_NY: np.ndarray, label_NY: np.ndarray) -> np.ndarray:
    """The average precision of each class, float64 [Y]."""
    order_NY = np.argsort(-score_NY, axis=0, kind="stable")
    right_NY = np.take_along_axis(label_NY.astype(bool), order_NY, axis=0)
    precision_NY = right_NY.cumsum(axis=0) / np.arange(1, len(right_NY) + 1)[:, None]
    found: np.ndarray = (precision_NY * right_NY).sum(axis=0) / np.maximum(right_NY.sum(axis=0), 1)
    return found


def chance_average_precisions(label_NY: np.ndarray) -> np.ndarray:
    """The expected average precision of a random order of the images, float64 [Y].

    Rank k holds one of P images among N with probability P/N. Where it does, 1 + (k - 1)(P - 1)/(N - 1) of the first
    k are expected to be right. The mean over P of precision at the right ranks is therefore
    1/N sum over k of 1/k (1 + (k - 1)(P - 1)/(N - 1)).
    """
    images = len(label_NY)
    shown_Y = label_NY.astype(bool).sum(axis=0)
    harmonic = (1 / np.arange(1, images + 1)).sum()
    others_Y = (shown_Y - 1) / max(images - 1, 1)
    chance_Y: np.ndarray = np.where(shown_Y > 0, (harmonic + others_Y * (images - harmonic)) / images, 0.0)
    return chance_Y


def precision_uncertainty(score_NY: np.ndarray, label_NY: np.ndarray, draws: int = 200) -> Uncertainty:
    """The uncertainty of the mean over classes, by a bootstrap over images: 1.96 standard errors each way.

    An image that is drawn w times counts w times at its rank, so nothing is sorted again. The mean of a draw is over
    the classes that its images show, since a draw says nothing of a rare class that it misses. Classes that no image
    of the set shows are 0 in every draw, as in the score. A perfect ranking of the others has no error.
    """
    order_NY = np.argsort(-score_NY, axis=0, kind="stable")
    right_NY = np.take_along_axis(label_NY.astype(bool), order_NY, axis=0)
    images, rng, means = len(label_NY), np.random.default_rng(0), []
    for _ in range(draws):
        weight_N = np.bincount(rng.integers(0, images, images), minlength=images).astype(np.float64)
        weight_NY = weight_N[order_NY]
        hit_NY = weight_NY * right_NY
        precision_NY = hit_NY.cumsum(axis=0) / np.maximum(weight_NY.cumsum(axis=0), 1)
        hits_Y = hit_NY.sum(axis=0)
        if hits_Y.any():
            means.append(((precision_NY * hit_NY).sum(axis=0)[hits_Y > 0] / hits_Y[hits_Y > 0]).mean())
    shown = float(right_NY.any(axis=0).mean())  # share of classes that an image shows; the others add 0 to every mean
    error = shown * float(np.std(means, ddof=1)) if shown else 0.0
    mean = float(average_precisions(score_NY, label_NY).mean())
    return Uncertainty(error, (min(mean, max(0.0, mean - Z * error)), max(mean, min(1.0, mean + Z * error))))
