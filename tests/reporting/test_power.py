"""Power: against statsmodels where samples add nothing, against simulation where they do."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t
from statsmodels.stats.power import TTestPower

from tests.records import make_record
from tests.reporting.test_leaderboard import failure, runs
from upcycle_bench import cli
from upcycle_bench.record import write
from upcycle_bench.reporting.collect import collect
from upcycle_bench.reporting.leaderboard import build
from upcycle_bench.reporting.power import CHANCE, chance_to_find, detectable, needed, smallest
from upcycle_bench.util.errors import UserError


@pytest.mark.parametrize("seeds", [5, 10, 30])
def test_seeds_alone_are_the_paired_t_test(seeds: int) -> None:
    expected = TTestPower().solve_power(nobs=seeds, alpha=0.05, power=CHANCE)
    assert smallest(2.0, 0.0, seeds) == pytest.approx(2 * expected, rel=1e-3)


@pytest.mark.parametrize("difference", [0.5, 1.0, 2.0])
def test_needed_seeds_are_those_of_the_paired_t_test(difference: float) -> None:
    expected = math.ceil(TTestPower().solve_power(difference, alpha=0.05, power=CHANCE))
    assert needed(1.0, 0.0, difference) == max(3, expected)  # fewer are not ranked


def test_the_chance_is_that_of_a_simulation() -> None:
    """Three seeds with the spread 1, and samples that add 0.5, whose errors are estimated by 2 and by many degrees."""
    random, found = np.random.default_rng(0), 0
    for _ in range(20_000):
        value_S = random.normal(3.0, 1.0, 3) + random.normal(0, 0.5)
        own = value_S.var(ddof=1) / 3
        error = math.sqrt(own + 0.25)
        found += abs(value_S.mean()) / error > t.ppf(0.975, 2 * (error**2 / own) ** 2)
    assert chance_to_find(3.0, 1.0, 0.5, 3) == pytest.approx(found / 20_000, abs=0.06)


def test_more_tests_ask_for_more_and_samples_are_a_floor() -> None:
    found = [smallest(1.0, 0.0, 5, tests) or 0.0 for tests in (1, 4, 16)]
    assert found == sorted(found) and found[0] < found[-1]
    assert needed(1.0, 1.0, 1.0) is None and needed(1.0, 1.0, 10.0) is not None
    assert smallest(1.0, 0.0, 1) is None and smallest(0.0, 0.0, 3) == 0.0 and needed(0.0, 0.0, 1.0) == 3


def test_a_board_pools_the_spread_of_its_strategies() -> None:
    """Paired differences 1, 2, 3 and 0, 0, 6: variances 1 and 12, pooled 6.5."""
    (board,) = build(
        runs("sparse-upcycling", {0: 0.0, 1: 0.0, 2: 0.0})
        + runs("new", {0: 1.0, 1: 2.0, 2: 3.0})
        + runs("other", {0: 0.0, 1: 0.0, 2: 6.0})
        + runs("one", {0: 1.0})
    )
    found = detectable(board, "in-distribution", difference=20.0)
    assert (found.spread, found.samples, found.tests) == (pytest.approx(math.sqrt(6.5)), 0.0, 3)
    rows = {row.label: row for row in found.rows}
    assert rows["new"].smallest == rows["other"].smallest == smallest(found.spread, 0.0, 3, 3)
    assert rows["one"].smallest is None and {row.needed for row in found.rows} == {needed(found.spread, 0.0, 20.0, 3)}
    own = {row.label: row.needed for row in detectable(board, "in-distribution").rows}
    assert own["new"] == needed(found.spread, 0.0, 2.0, 3)
    assert not any(row.hidden for row in found.rows)


def test_what_the_samples_hide_no_number_of_seeds_finds() -> None:
    """Records of `smoke`, whose sets are small."""
    found = collect([Path(__file__).parents[2] / "results" / "smoke"])
    (board,) = build(found.records, found.outcomes)
    tiny, large = (detectable(board, "in-distribution", each) for each in (1e-4, 1.0))
    assert tiny.samples > 1e-3
    assert all(row.needed is None and row.hidden for row in tiny.rows)
    assert all(row.needed == 3 and not row.hidden for row in large.rows)


def test_one_seed_shows_nothing() -> None:
    (board,) = build([make_record("sparse-upcycling"), make_record("new")])
    with pytest.raises(UserError, match="two training seeds in common; run more"):
        detectable(board, "in-distribution")


def test_the_command_says_what_it_lacks_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All runs failed; and outcomes that are not beside their record."""
    write(failure("dense"), None, tmp_path / "failed")
    for seed in (0, 1):
        for label in ("dense", "new"):
            path = write(make_record(label, seed, seed), {"zero-shot/a/rank": np.zeros(3)}, tmp_path / "some")
    path.with_suffix(".npz").unlink()
    for folder, status, said in (("failed", 2, "no run of these records succeeded"), ("some", 0, "over seeds alone")):
        monkeypatch.setattr("sys.argv", ["upcycle-bench", "power", str(tmp_path / folder)])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        errors = capsys.readouterr().err
        assert leave.value.code == status and said in errors and "Traceback" not in errors
        assert len(errors.splitlines()) == (1 if status else 2)  # a protocol that is not whole, a file that is missing
