"""Tables of scores on the terminal, with their standard errors and intervals."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.records import headlines_of, make_record, score
from upcycle_bench.cli.run import show_outcomes, show_record
from upcycle_bench.cli.tables import score_rows, show_key, show_scores
from upcycle_bench.reporting.leaderboard import build
from upcycle_bench.suite import AVERAGE, is_average


def test_callers_tell_which_set_a_score_is_of(capsys):
    """A leaderboard's row and what `run` prints: 1-shot and 2-shot of one test set, 0.05 each, are 0.05 together."""
    scores = [
        score(f"digits/{k}-shot", "acc1", 0.5, headline="few-shot") | {"standard_error": 0.05, "interval": (0.4, 0.6)}
        for k in (1, 2)
    ]
    headlines = headlines_of(scores)
    made = make_record(scores=scores, headlines=headlines)
    (board,) = build([made])
    assert board.rows[0].headlines["few-shot"].standard_error == pytest.approx(0.05)
    show_record(made, Path("record.json"))
    assert "few-shot: 0.5000 ± 0.0500 (mean of 2 scores, higher is better)" in capsys.readouterr().out


def test_a_run_shows_every_headline_with_its_direction_and_chance(capsys):
    scores = [
        score("a", "log_rank", 1.25, headline="in-distribution", lower=True) | {"standard_error": 0.125, "chance": 3.0},
        score("b", "image_retrieval_log_rank", 2.0, headline="shift", lower=True),
        score("c", "text_retrieval_log_rank", 3.0, headline="shift", lower=True),
    ]
    scores = [{"chance": None, "standard_error": None, **each} for each in scores]
    show_record(make_record(scores=scores, headlines=headlines_of(scores)), Path("record.json"))
    lines = capsys.readouterr().out.splitlines()
    assert "in-distribution: 1.2500 ± 0.1250 (log_rank, lower is better, chance 3.0000)" in lines
    assert "shift: 2.5000 (mean of 2 scores, lower is better)" in lines
    assert not any("stand in the record" in line for line in lines)  # all of them are shown above
    averages = [
        score("average/shift", f"{way}_retrieval_log_rank", value, lower=True)
        for way, value in (("image", 2.0), ("text", 3.0))
    ]
    show_record(make_record(scores=[*scores, *averages], headlines=headlines_of(scores)), Path("record.json"))
    lines = capsys.readouterr().out.splitlines()
    assert "all 5 scores, strata included, stand in the record" in lines
    assert "shift: 2.5000 (mean of 2 scores, lower is better)" in lines
    datasets = [line.split()[0] for line in lines if "_rank " in line and line[0] not in " si"]
    assert datasets == ["a"]  # the means stand for b and c
    assert sum(line.startswith("shift ") for line in lines) == 2


def test_a_table_says_of_which_headline_a_score_is_a_part():
    part = {"suite": "s", "dataset": "d", "value": 1.0, "chance": None, "samples": 20, "standard_error": None}
    part |= {"interval": None}
    rows = score_rows([part | {"metric": "log_rank", "headline": "shift"}, part | {"metric": "acc1", "headline": ""}])
    assert [row["metric"] for row in rows] == ["log_rank (shift)", "acc1"]


def test_a_matrix_shows_every_headline_as_a_table_and_as_json(capsys):
    scores = [score("a", "log_rank", 1.25, headline="near", lower=True), score("b", "acc1", 0.5, headline="photos")]
    made = make_record("new", train=3, scores=scores)
    failed = make_record("bad", status="failed", reason="why", value=None, cost=None, receipt=None)
    outcomes = []
    for label, found, reason in (("new", made, None), ("bad", failed, "why"), ("lost", None, "why")):
        plan = SimpleNamespace(row=label, init_seed=3, train_seed=4, protocol=made.protocol)
        cell = SimpleNamespace(strategy=label, seed="4", plan=plan)
        outcomes.append(SimpleNamespace(cell=cell, made=found, path=Path("a.json"), reason=reason, ran=True))
    show_outcomes(outcomes, as_json=True)
    one, *others = json.loads(capsys.readouterr().out)["runs"]
    assert (one["status"], one["headlines"]) == ("ok", {"near": 1.25, "photos": 0.5})
    for other in others:
        assert (other["status"], other["headlines"], other["reason"]) == ("failed", None, "why")
    show_outcomes(outcomes, as_json=False)
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if "strategy" in line).split()
    assert header[:4] == ["strategy", "seed", "near", "photos"]
    rows = [line.split()[:4] for line in out.splitlines()]
    assert ["new", "4", "1.2500", "0.5000"] in rows
    assert all([label, "4", "failed", "failed"] in rows for label in ("bad", "lost"))


def test_runs_of_a_matrix_with_other_headlines_share_its_table(capsys):
    """A first suite may fail in one run only: the headlines of that run are then those of the next suite."""
    outcomes = []
    for label, name in (("one", "near"), ("two", "far")):
        made = make_record(label, scores=[score("a", "acc1", 0.25, headline=name)])
        plan = SimpleNamespace(row=label, init_seed=0, train_seed=0, protocol=made.protocol)
        cell = SimpleNamespace(strategy=label, seed="0", plan=plan)
        outcomes.append(SimpleNamespace(cell=cell, made=made, path=Path("a.json"), reason=None, ran=True))
    show_outcomes(outcomes, as_json=False)
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["one", "0", "0.2500"] in rows and ["two", "0", "0.2500"] in rows


def test_tables_show_the_interval_where_the_error_is_nothing(capsys):
    part = {"suite": "s", "dataset": "d", "metric": "acc1", "headline": "", "chance": None, "samples": 20}
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
    part = {"dataset": "d", "metric": "acc1", "headline": "", "chance": 0.1, "samples": 20, "standard_error": None}
    part |= {"interval": None}
    averaged = [part | {"suite": "a", "value": 0.25}, part | {"suite": "a", "value": 0.75, "dataset": AVERAGE}]
    show_scores("all of it", averaged)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "all of it" and "0.7500" in lines[3] and len(lines) == 5  # the average alone
    show_scores("all of it", [*averaged, part | {"suite": "b", "value": 0.5}])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "all of it" and [line for line in lines if line in ("a", "b")] == ["a", "b"]
    assert sum("0.5000" in line for line in lines) == 1  # b has no average, so all its scores stand
    of_headlines = [part | {"suite": "a", "value": 0.25, "dataset": "d", "headline": "0.5"}]
    of_headlines += [part | {"suite": "a", "value": value, "dataset": f"{AVERAGE}/{value}"} for value in (0.5, 0.75)]
    assert [row["dataset"] for row in score_rows(of_headlines)] == ["0.5", "0.75"]  # their headlines
    assert [is_average(name) for name in (AVERAGE, "average/in", "average-set", "averages/a", "d")] == [
        True, True, False, False, False
    ]  # fmt: skip


def test_a_mean_hides_the_sets_it_is_of_and_no_others():
    """One retrieval set and two classification sets of a headline, and a set of none: only the two have a mean."""
    part = {"suite": "a", "value": 0.5, "chance": 0.1, "samples": 20, "standard_error": None, "interval": None}
    rows = [
        part | {"dataset": dataset, "metric": metric, "headline": headline}
        for dataset, metric, headline in (
            ("one", "acc1", "shift"),
            ("one", "acc1[seen]", ""),
            ("two", "acc1", "shift"),
            ("pairs", "recall@1", "shift"),
            ("other", "acc1", ""),
            ("average/shift", "acc1", ""),
        )
    ]
    shown = [(row["dataset"], row["metric"]) for row in score_rows(rows)]
    assert shown == [("pairs", "recall@1 (shift)"), ("other", "acc1"), ("shift", "acc1")]
