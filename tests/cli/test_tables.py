"""Tables of scores on the terminal, with their standard errors and intervals."""

from pathlib import Path

import pytest

from tests.test_record import make_record, score
from upcycle_bench.cli.run import show_record
from upcycle_bench.cli.tables import score_rows, show_key, show_scores
from upcycle_bench.reporting.leaderboard import build
from upcycle_bench.suite import AVERAGE


def test_callers_tell_which_set_a_score_is_of(capsys):
    """A leaderboard's row and what `run` prints: 1-shot and 2-shot of one test set, 0.05 each, are 0.05 together."""
    scores = [
        score(f"digits/{k}-shot", "acc1", 0.5, primary=True) | {"standard_error": 0.05, "interval": (0.4, 0.6)}
        for k in (1, 2)
    ]
    made = make_record(scores=scores, primary=0.5)
    (board,) = build([made])
    assert board.rows[0].primary_standard_error == pytest.approx(0.05)
    show_record(made, Path("record.json"))
    assert "primary: 0.5000 ± 0.0500, the mean of 2 scores" in capsys.readouterr().out


def test_tables_show_the_interval_where_the_error_is_nothing(capsys):
    part = {"suite": "s", "dataset": "d", "metric": "acc1", "primary": False, "chance": None, "samples": 20}
    values = [(0.5, 0.1, (0.3, 0.7)), (1.0, 0.0, (0.8389, 1.0)), (0.0, 0.0, (0.0, 0.16)), (0.3, 0.0, (0.3, 0.3))]
    values.append((0.25, None, None))
    rows = score_rows(
        [part | {"value": value, "standard_error": error, "interval": interval} for value, error, interval in values]
    )
    assert [row["value"] for row in rows] == [
        "0.5000 ± 0.1000", "1.0000 [≥0.839]", "0.0000 [≤0.160]", "0.3000 ± 0.0000", "0.2500"
    ]  # fmt: skip
    show_key(rows)
    shown = capsys.readouterr().out
    assert (
        "±, SE: one standard error, over evaluation samples" in shown
        and "[≥a], [≤b]: the end of the 95 % interval" in shown
    )
    show_key(rows[4:])
    assert capsys.readouterr().out == ""


def test_each_suite_has_a_table_of_its_own(capsys):
    part = {"dataset": "d", "metric": "acc1", "primary": False, "chance": 0.1, "samples": 20, "standard_error": None}
    part |= {"interval": None}
    averaged = [part | {"suite": "a", "value": 0.25}, part | {"suite": "a", "value": 0.75, "dataset": AVERAGE}]
    show_scores("all of it", averaged)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "all of it" and "0.7500" in lines[3] and len(lines) == 5  # the average alone
    show_scores("all of it", [*averaged, part | {"suite": "b", "value": 0.5}])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "all of it" and [line for line in lines if line in ("a", "b")] == ["a", "b"]
    assert sum("0.5000" in line for line in lines) == 1  # b has no average, so all its scores stand
