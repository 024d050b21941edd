"""Leaderboards: which runs share a table, which of them count, and what a table says of them."""

from pathlib import Path
from typing import Any

import pytest

from tests.records import make_record, tuned_part
from tests.reporting.test_leaderboard import T1, close, failure, main, only, runs
from upcycle_bench.record import read, record_paths, write
from upcycle_bench.reporting.board import SeedMean
from upcycle_bench.reporting.formats import render
from upcycle_bench.reporting.leaderboard import build
from upcycle_bench.util.errors import UserError


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol": {"name": "lab"}},
        {"protocol": {"training_fingerprint": "other"}},
        {"protocol": {"suite_fingerprints": {"zero-shot": "other"}}},
        {"protocol": {"suite_fingerprints": {"zero-shot": "suite-fingerprint", "few-shot": "x"}}},
        {"hashes": {"dense": "other"}},
    ],
)
def test_only_equal_runs_share_a_board(changes: dict[str, Any]) -> None:
    boards = build([make_record("dense"), make_record("new", **changes)])
    assert sorted(row.label for board in boards for row in board.rows) == ["dense", "new"]
    assert [len(board.rows) for board in boards] == [1, 1]
    assert len(build([make_record("dense"), make_record("new", hashes={"weights": "other"})])) == 1


def test_the_open_division_comes_last_and_is_marked() -> None:
    opened = make_record("dense", protocol={"division": "open", "overrides": ("moe.experts=4",)})
    boards = build([opened, make_record("new")])
    assert [board.division for board in boards] == ["closed", "open"]
    for format in ("terminal", "md"):
        text = render(boards, format, 200)
        assert "open division" in text and "not to be compared with other tables: --set moe.experts=4" in text


def test_an_ablation_stands_beside_the_closed_rows_that_were_run_alike() -> None:
    """Options change no fingerprint; of its own labels and other fingerprints, the open table takes no closed row."""
    ablation = runs("new[a=2]", {0: 0.7, 1: 0.71, 2: 0.69}, protocol={"division": "open"})
    overridden = make_record("plain", protocol={"division": "open", "overrides": ("train.log_every=1",)}, value=0.1)
    closed = [*runs("dense", {0: 0.5, 1: 0.52, 2: 0.49}), make_record("plain", value=0.9)]
    other = make_record("dense", value=0.8, protocol={"training_fingerprint": "other"})
    boards = build([*ablation, overridden, *closed, other])
    assert [(board.division, [row.label for row in board.rows]) for board in boards] == [
        ("closed", ["dense"]),
        ("closed", ["plain", "dense"]),
        ("open", ["new[a=2]", "dense", "plain"]),
    ]
    rows = {row.label: row for row in boards[-1].rows}
    assert [row.guest for row in rows.values()] == [False, True, False]
    assert rows["dense"].title == rows["dense"].short_title == "dense (closed division)"
    assert boards[-1].baseline == "dense" and main(rows["new[a=2]"]).verdict == "better"
    assert main(rows["plain"]).mean.mean == 0.1  # its own, not the closed one's
    text = render(boards, "terminal", 200)
    assert "Rows marked closed division ran and were scored alike" in text and "dense (closed division)" in text


def test_options_open_a_run_that_was_recorded_as_closed() -> None:
    old = make_record("new[a=2]")
    assert old.protocol.division == "closed" and old.division == "open"
    (board,) = build([old])
    assert board.division == "open" and "options off the protocol's defaults" in render([board], "md")


def test_a_tuned_row_is_closed_and_pays_for_all_that_was_tried() -> None:
    """21,000 charged FLOPs of the run, and 2 candidates by 2 seeds of 1,000."""
    part = tuned_part(("new", [0.5, 0.6]), ("new[a=2]", [0.6, 0.7]))
    made = [make_record("new[tuned]", strategy={"tuned": part}), make_record("dense", strategy={"status": "control"})]
    rows = only(build(made))
    assert rows["new[tuned]"].title == "new[tuned] (a=2, the best of 2 tried)" and rows["dense"].title.startswith(
        "dense"
    )
    assert (rows["new[tuned]"].charged_flops, rows["dense"].charged_flops) == (25_000, 21_000)
    uncounted = tuned_part(("new", [0.5]), ("new[a=2]", [0.6]))
    uncounted["candidates"][1]["runs"][0]["flops"] = None
    assert only(build([make_record("new[tuned]", strategy={"tuned": uncounted})]))["new[tuned]"].charged_flops is None


def test_of_a_row_that_was_tuned_again_the_newest_choice_counts() -> None:
    """Also where it has fewer seeds."""
    first, second = tuned_part(("new", [0.5])), tuned_part(("new", [0.5]), ("new[a=2]", [0.6]))
    old = runs("new[tuned]", {0: 0.7, 1: 0.71, 2: 0.69}, strategy={"tuned": first})
    new = make_record("new[tuned]", train=1, value=0.9, strategy={"tuned": second}, created="2026-01-03T00:00:00Z")
    (row,) = only(build([new, *old])).values()
    assert (row.runs, row.superseded, row.mixed, main(row).mean.mean) == (1, 3, False, 0.9)
    failed = make_record("new[tuned]", strategy={"tuned": second}, status="failed", reason="killed", value=None)
    (row,) = only(build([*old, failed])).values()
    assert (row.runs, row.superseded, row.failed) == (3, 0, 1)


def test_an_open_table_says_what_opened_each_of_its_rows() -> None:
    overridden = [
        make_record(label, protocol={"division": "open", "overrides": (f"train.log_every={number}",)})
        for number, label in enumerate(("old", "new"))
    ]
    wide = make_record("wide", protocol={"division": "open", "unequal": "twice the FLOPs"})
    ablation = make_record("new[a=2]", protocol={"division": "open"})
    (board,) = build([*overridden, wide, ablation])
    assert (
        "not to be compared with other tables: --set train.log_every=0 --set train.log_every=1; twice the FLOPs; "
        "options off the protocol's defaults." in render([board], "md")
    )


def test_a_shape_of_another_cost_is_explained() -> None:
    dear = make_record("wide", protocol={"division": "open", "unequal": "twice the FLOPs"})
    assert "not to be compared with other tables: twice the FLOPs" in render(build([dear]), "md")
    both = make_record("wide", protocol={"division": "open", "unequal": "twice", "overrides": ("threads=2",)})
    assert "not to be compared with other tables: --set threads=2; twice" in render(build([both]), "md")


def test_the_newest_success_counts() -> None:
    records = [
        make_record(value=2.0, created="2026-01-03T00:00:00Z", run_id="second-run"),
        make_record(value=1.0, created="2026-01-02T23:59:59.999999+00:00", run_id="first-run"),
        failure("dense", created="2026-01-04T00:00:00Z", run_id="third-run"),
    ]
    for order in (records, records[::-1]):
        row = only(build(order))["dense"]
        assert main(row).mean == SeedMean(2.0, None, 1)
        assert (row.runs, row.failed, row.superseded) == (1, 1, 1) and row.outcome == "ok, 1 failed, 1 superseded"


def test_a_label_with_failures_only_keeps_a_row() -> None:
    boards = build(
        [
            *runs("dense", {0: 1.0}),
            failure("b", reason="older", created="2026-01-01T00:00:00Z"),
            failure("b", train=1, reason="RuntimeError: [gloo]\nconnection | closed", status="failed"),
            failure("a"),
        ]
    )
    rows = only(boards)
    assert [(row.rank, label) for label, row in rows.items()] == [(None, "dense"), (None, "a"), (None, "b")]
    assert rows["a"].headlines == {} and rows["a"].seeds == 0 and rows["a"].train_flops is None
    assert rows["a"].outcome == "failed: RuntimeError: out of memory"
    assert rows["b"].outcome == "failed: RuntimeError: [gloo] connection | closed (2 failed)"
    assert rows["a"].outcome in render(boards, "terminal", 250) and rows["b"].outcome in render(boards, "terminal", 250)
    assert r"| failed: RuntimeError: [gloo] connection \| closed (2 failed) |" in render(boards, "md")


def test_marks() -> None:
    rows = only(
        build(
            [
                make_record("dense", strategy={"status": "control"}),
                make_record("derived", strategy={"status": "reconstructed"}),
                make_record("plain"),
                make_record("restarted", strategy={"status": "reconstructed", "footing": "restarts"}),
                make_record("taught", strategy={"footing": "teacher charged"}),
            ]
        )
    )
    assert [row.title for row in rows.values()] == [
        "dense (control)",
        "derived (reconstructed)",
        "plain",
        "restarted (reconstructed; restarts)",
        "taught (teacher charged)",
    ]


@pytest.mark.parametrize(
    "changes",
    [{"version": "0.2.0"}, {"config": {"tau": 0.7}}, {"distribution": "fork"}, {"code": "0123456789abcdef"}],
)
def test_a_row_of_different_code_says_so(changes: dict[str, Any]) -> None:
    rows = only(build([make_record("new", train=0), make_record("new", train=1, strategy=changes)]))
    assert rows["new"].outcome == "ok, mixes configurations, versions or code"


def test_runs_with_changes_that_no_commit_has_are_counted() -> None:
    def tree(dirty: bool) -> dict[str, Any]:
        return {"git": {"commit": "c", "dirty": dirty}}

    scored, clean, wheel = {"environment": tree(True)}, {"environment": tree(False)}, {"environment": {"git": None}}
    trained = {"environment": tree(False) | {"training": {"time": "t", "environment": tree(True)}}}
    records = [make_record("new", train=seed, **each) for seed, each in enumerate((scored, clean, wheel, trained))]
    boards = build([*records, make_record("dense", **clean)])
    assert {label: row.outcome for label, row in only(boards).items()} == {
        "new": "ok, 2 of a dirty tree",
        "dense": "ok",
    }
    assert "2 of a dirty tree" in render(boards, "terminal", 250)


def test_from_files(tmp_path: Path) -> None:
    for record in (*runs("dense", {0: 1.0, 1: 3.0}), failure("new")):
        write(record, None, tmp_path)
    rows = only(build([read(path) for path in record_paths(tmp_path)]))
    close(main(rows["dense"]).mean, 2.0, T1, 2)  # 1, 3: sd sqrt(2)
    assert rows["new"].rank is None


def test_no_records() -> None:
    with pytest.raises(UserError, match="a leaderboard needs records"):
        build([])
