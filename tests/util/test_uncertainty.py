"""Standard errors and intervals, against numbers worked out by hand, a bootstrap, and simulated coverage.

Shape suffixes: N samples, P pairs, Y classes.
"""

import math

import numpy as np
import pytest

from upcycle_bench.util import uncertainty
from upcycle_bench.util.uncertainty import of_mean, of_outcomes, of_recalls, of_scores, of_shares, wilson


def bootstrap(statistic, samples: int, draws: int = 4000) -> float:
    """Standard deviation of the statistic over resamples of 0 .. samples - 1."""
    rng = np.random.default_rng(0)
    return float(np.std([statistic(rng.integers(0, samples, samples)) for _ in range(draws)], ddof=1))


def test_a_share_by_hand():
    # 8 of 10: p = 0.8, z^2 / n = 0.38415; middle (0.8 + 0.19207) / 1.38415 = 0.71674,
    # half 1.95996 * sqrt(0.8 * 0.2 / 10 + 0.38415 / 40) / 1.38415 = 0.22658 (Wilson 1927): 0.4902, 0.9433.
    known = of_outcomes(np.array([True] * 8 + [False] * 2))
    assert known.standard_error == pytest.approx(math.sqrt(0.8 * 0.2 / 10))
    assert known.interval == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_a_perfect_share_keeps_an_interval():
    known = of_outcomes(np.ones(20, dtype=bool))
    assert known.standard_error == 0
    assert known.interval == pytest.approx((1 / (1 + uncertainty.Z**2 / 20), 1))  # 0.839
    assert of_outcomes(np.zeros(20, dtype=bool)).interval == pytest.approx((0, 1 - 0.8389), abs=1e-4)


def test_a_mean_is_that_of_numpy():
    value_N = np.random.default_rng(1).exponential(size=50).astype(np.float32)
    known = of_outcomes(value_N)
    assert known.standard_error == pytest.approx(value_N.std(ddof=1) / math.sqrt(50), rel=1e-6)
    assert known.interval[1] - known.interval[0] == pytest.approx(2 * 1.96 * known.standard_error, rel=1e-4)
    assert of_outcomes(value_N[:1]) == uncertainty.Uncertainty(None, None)


@pytest.mark.parametrize("share", [True, False])
def test_captions_of_one_image_are_one_sample(share):
    """Against a bootstrap over images. With captions as samples, the error would be far too small."""
    rng = np.random.default_rng(2)
    cluster_N = np.repeat(np.arange(100), 1 + np.arange(100) % 5)
    value_N = rng.normal(size=100)[cluster_N] + 0.3 * rng.normal(size=len(cluster_N))
    outcome_N = value_N > 0.5 if share else value_N
    members = [np.flatnonzero(cluster_N == image) for image in range(100)]
    by_images = bootstrap(lambda chosen: outcome_N[np.concatenate([members[i] for i in chosen])].mean(), 100)
    known = of_outcomes(outcome_N, cluster_N)
    assert known.standard_error == pytest.approx(by_images, rel=0.1)
    assert of_outcomes(outcome_N).standard_error < 0.7 * by_images
    alone = of_outcomes(outcome_N, np.arange(len(outcome_N)))
    assert alone == of_outcomes(outcome_N)  # with one caption each nothing changes
    if share:
        p, worth = outcome_N.mean(), outcome_N.mean() * (1 - outcome_N.mean()) / known.standard_error**2
        assert known.interval == wilson(p, worth)
        assert of_outcomes(np.ones(9, dtype=bool), np.arange(9) // 3).interval == wilson(1.0, 3)


def test_shares_count_clusters():
    values = np.random.default_rng(0).random(40)
    alone = np.arange(40)
    known = of_shares([values], [alone])
    assert known.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(40))
    # The same values twice, as clusters of two, give the same error.
    twice = of_shares([np.repeat(values, 2)], [np.repeat(alone, 2)])
    assert twice.standard_error == pytest.approx(known.standard_error)
    # By hand: means 1/2 and 1, mean 3/4. Residuals over (2 values * 2 sets): a 1/8, b -1/8, of the other set none.
    # Sum of squares 1/32, times 2 clusters / 1: 1/16. Worth 3/4 * 1/4 / (1/16) = 3 samples.
    two = of_shares([np.array([1.0, 0.0]), np.array([1.0, 1.0])], [np.array(["a", "b"]), np.array(["a", "a"])])
    assert two.standard_error == pytest.approx(0.25) and two.interval == pytest.approx(wilson(0.75, 3))
    assert of_shares([np.ones(9, dtype=bool)], [np.arange(9) // 3]) == uncertainty.Uncertainty(0.0, wilson(1.0, 3))
    single = of_shares([np.array([1.0, 0.0])], [np.array(["a", "a"])])
    assert single == uncertainty.Uncertainty(None, wilson(0.5, 1))


def test_errors_and_intervals_are_those_of_drawing_words_anew():
    """Against the spread of the mean over many simulated sets, in which each word is easy or hard."""
    rng = np.random.default_rng(1)
    means, errors, held = [], [], []
    for _ in range(400):
        word_P = np.repeat(np.arange(30), rng.integers(1, 12, 30))
        right_P = rng.random(len(word_P)) < rng.random(30)[word_P]  # half of them, in the long run
        known = of_shares([right_P], [word_P])
        means.append(right_P.mean())
        errors.append(known.standard_error)
        held.append(known.interval[0] <= 0.5 <= known.interval[1])
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.12)
    assert np.mean(held) > 0.91


def test_recalls_against_a_bootstrap_within_classes():
    rng = np.random.default_rng(3)
    label_N = np.repeat(np.arange(8), 40)
    correct_N = rng.random(320) < (0.2 + 0.08 * label_N)
    by_class = correct_N.reshape(8, 40)

    def recall(chosen: np.ndarray) -> float:
        return float(np.mean([by_class[label][chosen[label * 40 : label * 40 + 40] % 40].mean() for label in range(8)]))

    known = of_recalls(correct_N, label_N)
    assert known.standard_error == pytest.approx(bootstrap(recall, 320), rel=0.06)
    assert known.interval[0] < correct_N.mean() < known.interval[1]


def test_classes_of_one_sample_are_not_certain():
    """Each has a recall of 0 or 1, so p (1 - p) = 0. Together they have the error of a share."""
    correct_N = np.arange(40) % 4 == 0
    known = of_recalls(correct_N, np.arange(40))
    assert known.standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 40))
    assert known.interval[0] < 0.25 < known.interval[1]
    assert of_recalls(np.ones(40, dtype=bool), np.arange(40)).interval[0] < 0.95


@pytest.mark.parametrize(("per_class", "chance"), [(2, 0.9), (5, 0.97), (30, 0.99)])
def test_intervals_of_recalls_hold_the_truth(per_class, chance):
    """Simulated: 95 % do, with classes that differ and are near 1. Of 1.96 standard errors, about 89 % would."""
    rng = np.random.default_rng(per_class)
    truth_Y = np.clip(rng.normal(chance, 0.05, 12), 0, 1)
    label_N = np.repeat(np.arange(12), per_class)
    held = []
    for _ in range(1000):
        low, high = of_recalls(rng.random(len(label_N)) < truth_Y[label_N], label_N).interval
        held.append(low <= truth_Y.mean() <= high)
    assert np.mean(held) > 0.93


def test_means_of_independent_numbers():
    # sqrt(0.03^2 + 0.04^2) / 2 = 0.025; below sqrt(0.1^2 + 0.05^2) / 2, above sqrt(0.2^2 + 0.15^2) / 2 = 0.125
    known = of_mean([(0.4, 0.03, (0.3, 0.6)), (0.8, 0.04, (0.75, 0.95))])
    assert known.standard_error == pytest.approx(0.025)
    assert known.interval == pytest.approx((0.6 - math.sqrt(0.0125) / 2, 0.6 + 0.125))
    assert of_mean([(0.4, 0.03, (0.3, 0.6)), (0.8, None, None)]) == uncertainty.Uncertainty(None, None)


def test_scores_of_the_same_images_are_taken_to_move_together():
    # two sets of one metric: hypot(0.3, 0.4) = 0.5; two metrics: 0.5 + 0.1, over 3 scores
    assert of_scores([("x", "a", 0.3), ("y", "a", 0.4), ("x", "b", 0.1)]) == pytest.approx(0.2)
    assert of_scores([("x", "a", 0.3), ("x", "b", None)]) is None and of_scores([]) is None
    # other shots of one set: 0.1 + 0.2 = 0.3, with the other set hypot(0.3, 0.4) = 0.5; all of it 0.6, over 4 scores
    shots = [("x/1-shot", "a", 0.1), ("y/1-shot", "a", 0.4), ("x/all", "a", 0.2)]
    assert of_scores([*shots, ("x/all", "b", 0.1)]) == pytest.approx(0.15)
