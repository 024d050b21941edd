"""Intervals over seeds and samples: worked by hand, and right as often as they say where the truth is known."""

import itertools
import math
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle_bench.reporting.resampling import (
    Sure,
    holm,
    of_seeds,
    rank_intervals,
    sample_draws,
    seed_draws,
    tied_groups,
)


def test_seeds_alone_give_students_interval() -> None:
    """1, 2, 6: mean 3, deviations -2, -1, 3, variance 7; t of 2 degrees is 4.302653."""
    sure = of_seeds(np.array([1.0, 2.0, 6.0]))
    assert (sure.mean, sure.seeds, sure.degrees, sure.of_samples) == (3.0, 3, 2.0, None)
    assert sure.standard_error == pytest.approx(math.sqrt(7 / 3))
    assert sure.interval == pytest.approx((3 - 4.302653 * math.sqrt(7 / 3), 3 + 4.302653 * math.sqrt(7 / 3)))
    # t = 3 / 1.527525 = 1.963961; two-sided p of 2 degrees: 1 - t / sqrt(t^2 + 2)
    t = 3 / math.sqrt(7 / 3)
    assert sure.p == pytest.approx(1 - t / math.sqrt(t * t + 2))


def test_one_seed_has_no_interval_and_equal_seeds_have_no_doubt() -> None:
    assert of_seeds(np.array([2.0])) == Sure(2.0, 1)
    same, none = of_seeds(np.array([2.0, 2.0, 2.0])), of_seeds(np.zeros(3))
    assert same.interval == (2.0, 2.0) and same.p is none.p is None  # equal numbers do not tell how others differ


def test_samples_add_to_the_error_and_to_the_degrees() -> None:
    """Three equal seeds of samples 0 and 1: the mean of n samples has the error 1/2 / sqrt(n)."""
    outcome_RN = np.tile(np.repeat([0.0, 1.0], 200), (3, 1))
    drawn_SB = sample_draws([(outcome_RN, 1.0)])
    sure = of_seeds(outcome_RN.mean(1), drawn_SB)
    assert sure.of_seeds == 0 and sure.standard_error == pytest.approx(0.5 / 20, rel=0.05)
    assert sure.half_width == pytest.approx(1.96 * 0.5 / 20, rel=0.05)  # of the normal distribution
    apart = of_seeds(0.5 + np.array([-0.025, 0, 0.025]), drawn_SB)  # sd 0.025, by sqrt(3) 0.0144
    assert apart.of_seeds == pytest.approx(0.025 / math.sqrt(3))
    assert apart.standard_error == pytest.approx(math.hypot(0.025 / math.sqrt(3), 0.025), rel=0.05)
    assert apart.degrees == pytest.approx(2 * 4**2, rel=0.2)  # 2 (1 + 3)^2 by Satterthwaite


def test_draws_of_samples_are_those_of_a_plain_loop() -> None:
    """Two sets with weights 1/4 and 3/4, against resampling one by one."""
    random = np.random.default_rng(0)
    sets = [(random.normal(size=(2, 250)), 0.25), (random.gamma(2.0, size=(2, 150)), 0.75)]
    drawn_RB = sample_draws(sets, draws=4000)
    plain = []
    for _ in range(4000):
        parts = [w * outcome[:, random.integers(0, outcome.shape[1], outcome.shape[1])].mean(1) for outcome, w in sets]
        plain.append(sum(parts))
    expected = np.array(plain).T
    assert drawn_RB.mean(1) == pytest.approx(expected.mean(1), abs=0.01)
    assert np.diag(np.cov(drawn_RB)) == pytest.approx(np.diag(np.cov(expected)), rel=0.1)
    assert np.cov(drawn_RB)[0, 1] == pytest.approx(np.cov(expected)[0, 1], abs=0.0006)
    assert np.array_equal(drawn_RB, sample_draws(sets, draws=4000))  # the same records give the same bytes


def test_runs_share_their_draws_of_samples() -> None:
    """A run that answers each sample a little better is surely better, though both are unsure."""
    outcome_N = np.random.default_rng(1).normal(size=300)
    drawn_RB = sample_draws([(np.stack([outcome_N, outcome_N + 0.01]), 1.0)])
    assert (drawn_RB[1] - drawn_RB[0]).std() < 1e-6 < 0.05 < drawn_RB[0].std()


def test_draws_of_seeds_have_the_variance_of_the_mean() -> None:
    value_S = np.array([1.0, 2.0, 6.0])
    assert seed_draws(value_S, draws=100_000).std() == pytest.approx(math.sqrt(7 / 3), rel=0.01)
    assert seed_draws(value_S, draws=100_000).mean() == pytest.approx(3.0, abs=0.02)
    assert seed_draws(np.array([5.0])).tolist() == [5.0] * 2000


def test_other_seeds_have_draws_of_their_own() -> None:
    value_S = np.array([1.0, 2.0, 6.0])
    same, again, other = (seed_draws(value_S, draws=20_000, key=key) for key in ((0, 1, 2), (0, 1, 2), (5, 6, 7)))
    assert np.array_equal(same, again) and abs(np.corrcoef(same, other)[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("seeds", "of_seed", "of_sample", "of_both"),
    [(3, 1.0, 0, 0), (3, 0.05, 1, 1), (5, 0.1, 1, 1), (3, 0.0, 1, 0.2), (5, 0.0, 0, 1), (3, 0.1, 0, 1)],
)  # fmt: skip
def test_intervals_hold_the_truth_as_often_as_they_say(
    seeds: int, of_seed: float, of_sample: float, of_both: float
) -> None:
    """Differences d = a_s + b_i + e_si whose mean is 0; of 400 intervals of 95 %, 380 are right on average."""
    random = np.random.default_rng(2)
    right = 0
    for _ in range(400):
        value_SN = random.normal(0, of_seed, (seeds, 1)) + np.zeros((seeds, 150))
        value_SN += random.normal(0, 1, (1, 150)) * of_sample + random.normal(0, 1, (seeds, 150)) * of_both
        drawn_SB = sample_draws([(value_SN, 1.0)], draws=300) if of_sample or of_both else None
        low, high = of_seeds(value_SN.mean(1), drawn_SB).interval or (1.0, -1.0)
        right += low <= 0 <= high
    assert 0.92 <= right / 400 <= 0.985


def test_what_is_own_to_a_seed_and_a_sample_counts_once() -> None:
    """Its variance, 1 / N for a seed, is in the variation of the seeds; samples that are hard for all add to it."""
    random = np.random.default_rng(4)
    own, common = [], []
    for _ in range(60):
        value_SN = random.normal(size=(5, 200))
        own.append(of_seeds(value_SN.mean(1), sample_draws([(value_SN, 1.0)], draws=300)).of_samples)
        value_SN += random.normal(size=(1, 200))
        common.append(of_seeds(value_SN.mean(1), sample_draws([(value_SN, 1.0)], draws=300)).of_samples)
    assert np.mean(own) < 0.012 and np.mean(common) == pytest.approx(1 / math.sqrt(200), rel=0.1)


@pytest.mark.parametrize("samples", range(2, 11))
def test_small_sets_draw_numbers(samples: int) -> None:
    outcome_RN = np.random.default_rng(samples).normal(size=(2, samples))
    drawn_RB = sample_draws([(outcome_RN, 1.0)])
    assert np.isfinite(drawn_RB).all()
    assert drawn_RB.std(1) == pytest.approx(outcome_RN.std(1) / math.sqrt(samples), rel=0.1)


def test_ranks_are_as_sure_as_the_scores() -> None:
    random = np.random.default_rng(3)
    centre = np.array([[3.0], [1.0], [1.02]])
    draws_LB = centre + random.normal(0, [[0.1], [0.1], [0.1]], (3, 2000))
    assert rank_intervals(draws_LB, higher_is_better=True) == [(1, 1), (2, 3), (2, 3)]
    assert rank_intervals(draws_LB, higher_is_better=False) == [(3, 3), (1, 2), (1, 2)]
    assert rank_intervals(np.zeros((2, 10)), higher_is_better=True) == [(1, 1), (1, 1)]  # equals share the better rank


def test_holm_by_hand() -> None:
    """0.01 x 4, 0.02 x 3, then max(0.06, 0.03 x 2), max(0.06, 0.5)."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([]) == []


def test_letters_by_hand() -> None:
    """Piepho's kind of case: a differs from c and d, b from d."""
    differ = {frozenset("ac"), frozenset("ad"), frozenset("bd")}
    assert tied_groups("abcd", differ) == {"a": "a", "b": "ab", "c": "bc", "d": "c"}
    assert tied_groups("abc", set()) == {"a": "a", "b": "a", "c": "a"}
    apart = {frozenset(pair) for pair in itertools.combinations(map(str, range(52)), 2)}
    assert sorted(tied_groups([*map(str, range(52))], apart).values()) == sorted(string.ascii_letters)
    apart |= {frozenset(("52", str(number))) for number in range(52)}
    assert {*tied_groups([*map(str, range(53))], apart).values()} == {""}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.data())
def test_two_share_a_letter_if_and_only_if_they_are_not_told_apart(count: int, data: st.DataObject) -> None:
    names = [f"s{number}" for number in range(count)]
    pairs = [frozenset(pair) for pair in itertools.combinations(names, 2)]
    differ = {pair for pair in pairs if data.draw(st.booleans())}
    letters = tied_groups(names, differ)
    groups = {mark: {name for name in names if mark in letters[name]} for name in names for mark in letters[name]}
    for pair in pairs:
        one, other = pair
        assert any({one, other} <= group for group in groups.values()) == (pair not in differ)
