"""Ranks over seeds: Demsar's own example, groups by hand and by scikit-posthocs, and blocks that are independent."""

import math

import numpy as np
import pytest
from scikit_posthocs import posthoc_nemenyi_friedman

from tests.records import make_record, score
from tests.reporting.test_standings import counting, diagonal
from upcycle_bench.reporting.critical_difference import rank, ranking_of, rankings
from upcycle_bench.util.errors import UserError

# Table 6 of Demsar 2006: AUC on 14 data sets. He ranks voting by digits that he does not print: hence 0.9751.
NAMES = ["C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf"]
AUC = """
    0.763 0.768 0.771 0.798    0.599 0.591 0.590 0.569    0.954 0.971 0.968 0.967    0.628 0.661 0.654 0.657
    0.882 0.888 0.886 0.898    0.936 0.931 0.916 0.931    0.661 0.668 0.609 0.685    0.583 0.583 0.563 0.625
    0.775 0.838 0.866 0.875    1.000 1.000 1.000 1.000    0.940 0.962 0.965 0.962    0.619 0.666 0.614 0.669
    0.972 0.981 0.9751 0.975   0.957 0.978 0.946 0.970
"""


def test_the_example_of_demsar() -> None:
    """He has mean ranks 3.143, 2.000, 2.893, 1.964, chi-squared 9.28 without correction for ties, F 3.69, CD 1.25."""
    auc_SL = np.array(AUC.split(), dtype=float).reshape(14, 4)
    found = rank(-auc_SL, NAMES, range(14))
    assert found.ranks == pytest.approx({"C4.5+m+cf": 1.964, "C4.5+m": 2.0, "C4.5+cf": 2.893, "C4.5": 3.143}, abs=5e-4)
    assert list(found.ranks) == ["C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5"]
    # Ties: four alike once (4^3 - 4 = 60), two alike three times (2^3 - 2 = 6 each), of N k (k^2 - 1) = 14 * 60.
    plain = found.statistic * (1 - (60 + 3 * 6) / (14 * 60))
    assert plain == pytest.approx(9.28, abs=0.005)
    assert 13 * plain / (14 * 3 - plain) == pytest.approx(3.69, abs=0.005)
    assert found.distance == pytest.approx(1.25, abs=0.005)
    assert found.p < 0.05 and found.groups == (("C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5"),)  # 3.143 - 1.964 < 1.25


def test_groups_by_hand() -> None:
    """Ten blocks, four strategies: CD 2.569 sqrt(4 * 5 / 60) = 1.483, so that mean ranks 1.8 and 3 are joined."""
    value_SL = np.array([[1, 2, 3, 4]] * 8 + [[2, 1, 3, 4]] * 2, dtype=float)
    found = rank(value_SL, ["a", "b", "c", "d"], range(10))
    assert found.ranks == pytest.approx({"a": 1.2, "b": 1.8, "c": 3.0, "d": 4.0})
    assert found.distance == pytest.approx(2.569 * math.sqrt(4 * 5 / 60), abs=1e-3)
    assert found.groups == (("a", "b"), ("b", "c"), ("c", "d"))
    assert [found.letters(label) for label in "abcd"] == ["a", "ab", "bc", "c"]
    # chi-squared = 12 * 10 / (4 * 5) * (1.2^2 + 1.8^2 + 3^2 + 4^2) - 3 * 10 * 5
    assert found.statistic == pytest.approx(6 * (1.44 + 3.24 + 9 + 16) - 150)
    assert "A bar joins" in found.said() and "chi-squared 28.08" in found.said()


def test_too_many_groups_have_no_letters() -> None:
    """Sixty strategies in one order over 600 blocks, of which neighbours alone are joined."""
    value_SL = np.tile(np.arange(60.0), (600, 1))
    found = rank(value_SL, [*map(str, range(60))], range(600))
    assert len(found.groups) > 52 and {found.letters(label) for label in found.ranks} == {""}
    fewer = rank(value_SL[:, :30], [*map(str, range(30))], range(600))
    assert fewer.letters("29")[-1] == "abcdefghijklmnopqrstuvwxyzABCD"[len(fewer.groups) - 1]


def test_groups_are_those_of_scikit_posthocs() -> None:
    random = np.random.default_rng(0)
    told = 0
    for strategies, blocks in [(3, 6), (4, 10), (6, 20), (9, 12)] * 5:
        value_SL = random.normal(size=(blocks, strategies)) + random.normal(0, 1.5, strategies)
        found = rank(value_SL, [*map(str, range(strategies))], range(blocks))
        if found.p >= 0.05:
            continue
        p_LL = posthoc_nemenyi_friedman(value_SL).to_numpy()
        for one in range(strategies):
            for other in range(one):
                joined = any({str(one), str(other)} <= {*group} for group in found.groups)
                assert joined == (p_LL[one, other] >= 0.05)
                told += not joined
    assert told > 50


def test_a_block_is_a_training_seed() -> None:
    """Two initialisations of seed 0 are averaged; higher is better; who has too few seeds is left out by name."""
    runs = counting(
        good={(0, 0): 5.0, (1, 0): 1.0, (1, 1): 3.0, (2, 2): 3.0},
        fair=diagonal(2.0, 2.0, 4.0, 9.0),
        poor=diagonal(1.0, 1.0, 1.0),
        few=diagonal(9.0, 9.0),
    )
    found = ranking_of(runs, "in-distribution", higher_is_better=True)
    assert found.ranks == pytest.approx({"good": 4 / 3, "fair": 5 / 3, "poor": 3.0}) and found.seeds == (0, 1, 2)
    assert found.left_out == {"few": "2 of 3 training seeds"} and "Left out: few (2 of 3" in found.said()
    turned = ranking_of(runs, "in-distribution", higher_is_better=False)
    assert list(turned.ranks) == ["poor", "fair", "good"]


def test_a_strategy_with_other_seeds_spoils_no_diagram() -> None:
    three = {"a": diagonal(1.0, 2.0, 3.0), "b": diagonal(2.0, 3.0, 4.0), "c": diagonal(3.0, 4.0, 5.0)}
    odd = {(seed, seed): 1.0 for seed in (1, 2, 7, 8, 9)}
    found = ranking_of(counting(**three, odd=odd), "in-distribution", higher_is_better=True)
    assert list(found.ranks) == ["c", "b", "a"] and found.left_out == {"odd": "other training seeds"}


def test_what_is_missing_is_one_line() -> None:
    for runs in ({}, counting(a=diagonal(1.0, 2.0, 3.0)), counting(a=diagonal(1.0), b=diagonal(2.0), c=diagonal(3.0))):
        with pytest.raises(UserError, match="needs 3 strategies with 3 training seeds in common; of") as raised:
            ranking_of(runs, "in-distribution", higher_is_better=True)
        assert "\n" not in str(raised.value)
    apart = {name: {(s, s): 1.0 for s in range(3 * place, 3 * place + 3)} for place, name in enumerate("abc")}
    (why,) = rankings(counting(**apart)).values()
    assert isinstance(why, str) and "of 3 here 2 have them" in why
    assert rankings({"failed": {}}) == {}


def test_equal_strategies_are_joined_by_one_bar() -> None:
    found = rank(np.ones((5, 3)), ["a", "b", "c"], range(5))
    assert (found.statistic, found.p, found.groups) == (0.0, 1.0, (("a", "b", "c"),))
    assert "Friedman's test finds no difference" in found.said()


def test_seeds_are_independent_blocks_and_sets_are_not() -> None:
    """Five equal strategies, 5 seeds, 6 sets; half of the variance of a score is its training's, on all sets alike."""
    random = np.random.default_rng(0)
    blocks = {"seeds": 0, "sets x seeds": 0, "sets": 0}
    for _ in range(150):
        value_SPL = random.normal(size=(5, 1, 5)) + random.normal(size=(5, 6, 5))
        for name, value_BL in (
            ("seeds", value_SPL.mean(1)), ("sets x seeds", value_SPL.reshape(30, 5)), ("sets", value_SPL.mean(0)),
        ):  # fmt: skip
            found = rank(value_BL, [*"abcde"], range(len(value_BL)))
            blocks[name] += len(found.groups) != 1 or len(found.groups[0]) < 5
    assert blocks["seeds"] / 150 <= 0.06
    assert blocks["sets x seeds"] / 150 > 0.4 and blocks["sets"] / 150 > 0.5


def test_runs_with_fewer_sets_do_not_compare() -> None:
    one = score("a", "acc1", 0.5, headline="in-distribution")
    both = [one, score("b", "acc1", 0.7, headline="in-distribution")]
    runs = {
        label: {(seed, seed): make_record(label, seed, seed, scores=parts) for seed in range(3)}
        for label, parts in (("a", both), ("b", both), ("c", both), ("d", [one]))
    }
    found = ranking_of(runs, "in-distribution", higher_is_better=True)
    assert found.left_out == {"d": "0 of 3 training seeds"}
    assert found.ranks == {"a": 2.0, "b": 2.0, "c": 2.0}
