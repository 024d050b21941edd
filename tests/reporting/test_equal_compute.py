"""The view of equal compute: who is compared with which run, in every format; and ways to a reference's final score."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.records import make_record
from tests.reporting.test_targets import curve
from upcycle_bench.record import Record
from upcycle_bench.reporting.comparable import counting_runs
from upcycle_bench.reporting.equal_compute import peers_of
from upcycle_bench.reporting.formats import only, render
from upcycle_bench.reporting.html import page
from upcycle_bench.reporting.leaderboard import build
from upcycle_bench.reporting.targets import Target
from upcycle_bench.util.errors import UserError

SHARED = {"division": "open", "unequal": "more FLOPs", "shared_fingerprint": "train-fingerprint"}


def runs(label: str, flops: int, values: Iterable[float] = (0.5, 0.51, 0.52), **more: object) -> list[Record]:
    """Runs of three training seeds, whose charged FLOPs are so many."""
    phase = {"seconds": 1.0, "peak_memory_bytes": 1}
    phases = {"train": {**phase, "flops": flops, "steps": 100}, "evaluate": {**phase, "flops": 10**9}}
    return [make_record(label, train=n, value=value, cost={"phases": phases}, **more) for n, value in enumerate(values)]


def longer(label: str, flops: int, values: Iterable[float] = (0.6, 0.61, 0.62), **more: object) -> list[Record]:
    """The same of another compute, whose table is its own."""
    own = {**SHARED, "training_fingerprint": f"with {flops}"}
    return runs(label, flops, values, protocol=own, **{"strategy": {"status": "control"}, **more})


EVERY = [
    *runs("sparse-upcycling", 1000),
    *runs("dense", 760, (0.4, 0.41, 0.42)),
    *runs("dense-longer", 1010),
    *runs("cheap", 900),
    *runs("costly", 1660, (0.55, 0.56, 0.57)),
    *runs("costlier", 3000),
    *longer("sparse-at-compute[compute=1.66]", 1640),
    *longer("sparse-at-compute[compute=1.9]", 1900),
]


def test_who_spent_more_is_compared_with_a_run_that_cost_as_much() -> None:
    counting = counting_runs(EVERY)
    assert peers_of(counting, "sparse-upcycling") == {
        "sparse-upcycling": "sparse-upcycling",
        "dense": "sparse-upcycling",
        "dense-longer": "sparse-upcycling",
        "cheap": "sparse-upcycling",
        "costly": "sparse-at-compute[compute=1.66]",
        "costlier": None,
        "sparse-at-compute[compute=1.66]": "sparse-at-compute[compute=1.66]",
        "sparse-at-compute[compute=1.9]": "sparse-at-compute[compute=1.9]",
    }
    dense = peers_of(counting, "dense")
    assert (dense["sparse-upcycling"], dense["dense-longer"], dense["costly"]) == ("dense-longer", "dense-longer", None)
    assert dense["cheap"] is None  # 900 is more than dense's 760, and no dense run cost as much


def test_a_reference_with_other_options_is_another_strategy() -> None:
    counting = counting_runs([*EVERY, *runs("sparse-upcycling[router_noise_std=1.0]", 1000)])
    assert peers_of(counting, "sparse-upcycling")["sparse-upcycling[router_noise_std=1.0]"] == "sparse-upcycling"


def test_costs_that_nobody_counted_compare_with_nothing() -> None:
    unknown = runs("costly", 1660)[0].model_dump()
    unknown["cost"]["phases"]["train"]["flops"] = None
    counting = counting_runs([*runs("sparse-upcycling", 1000), Record.model_validate(unknown)])
    assert peers_of(counting, "sparse-upcycling")["costly"] is None


def test_the_view_has_a_table_for_each_reference_with_differences_to_the_peers() -> None:
    sparse, dense = build(EVERY, view="compute")
    assert (sparse.view, sparse.baseline, dense.baseline) == ("compute", "sparse-upcycling", "dense")
    assert sparse.training_fingerprint == dense.training_fingerprint == "train-fingerprint"
    rows = {row.label: row for row in sparse.rows}
    assert len(rows) == 8
    costly = rows["costly"].headlines["in-distribution"]
    assert costly.difference is not None
    assert costly.difference.mean == pytest.approx(0.56 - 0.61)
    assert costly.verdict == "worse"  # all three differences are -0.05
    assert rows["costlier"].headlines["in-distribution"].verdict == "no reference"
    assert rows["cheap"].headlines["in-distribution"].difference.mean == pytest.approx(0)
    assert rows["sparse-at-compute[compute=1.66]"].headlines["in-distribution"].verdict == "reference"
    assert all(row.rank is None and row.headlines["in-distribution"].ranks is None for row in sparse.rows)
    # At equal steps runs of another compute have tables of their own, as before.
    assert [len(board.rows) for board in build(EVERY)] == [6, 1, 1]


def test_options_open_a_run_of_another_compute_but_a_controls_compute() -> None:
    """An ablation that costs more is no closed row, in whatever view."""
    ablation = longer("costly[k=4]", 2000, strategy={"status": "published"})
    dense = longer("dense-at-compute[compute=2.0]", 2000)
    boards = build([*EVERY, *ablation, *dense], view="compute")
    assert [board.division for board in boards] == ["closed", "closed"]
    labels = {row.label for board in boards for row in board.rows}
    assert "dense-at-compute[compute=2.0]" in labels and "costly[k=4]" not in labels


def test_every_format_says_what_is_compared_and_what_is_missing() -> None:
    boards = build(EVERY, view="compute")
    text = " ".join(render(boards, "terminal", width=100).split())
    assert "against sparse-upcycling of as much compute" in text
    assert "costly (1.66x) is compared with sparse-at-compute[compute=1.66] (1.64x)." in text
    assert "Nothing cost as much yet as costlier (3.00x)." in text
    assert "What is missing: upcycle-bench run -s sparse-at-compute -o compute=3.00 -p smoke --seeds 3" in text
    assert "run -s dense-at-compute -o compute=1.66 -p smoke --seeds 3; upcycle-bench run -s" in text
    assert "vs sparse-upcycling of as much compute" in render(boards, "md")
    assert "sparse-at-compute[compute=1.66]" in render(boards, "latex")
    lines = [*csv.DictReader(io.StringIO(render(boards, "csv")))]
    assert {(line["label"], line["board_baseline"]): line["peer"] for line in lines}["costly", "sparse-upcycling"] == (
        "sparse-at-compute[compute=1.66]"
    )
    assert {board["view"] for board in json.loads(render(boards, "json"))["boards"]} == {"compute"}
    html = page.render(boards, [(record, Path(f"{n}.json")) for n, record in enumerate(EVERY)])
    assert html.count("of as much compute") >= 2
    few = only(boards, ["costly"])
    assert [row.label for row in few[0].rows] == ["sparse-at-compute[compute=1.66]", "costly", "sparse-upcycling"]


def test_only_runs_of_the_same_protocol_and_data_are_beside_each_other() -> None:
    """Overrides, or another table that they share, keep them apart."""
    opened = longer("sparse-at-compute[compute=1.66]", 1640)
    for change in ({"overrides": ("a=1",)}, {"shared_fingerprint": "another"}):
        others = [each.model_copy(update={"protocol": each.protocol.model_copy(update=change)}) for each in opened]
        boards = build([*runs("sparse-upcycling", 1000), *runs("costly", 1660), *others], view="compute")
        assert {row.label: row.peer for row in boards[0].rows} == {
            "sparse-upcycling": "sparse-upcycling",
            "costly": None,
        }
    with pytest.raises(UserError, match="needs runs of sparse-upcycling or dense: there are none"):
        build(runs("costly", 1660), view="compute")


def test_a_row_has_the_way_to_each_reference() -> None:
    def curved(label: str, flops: int, *points: tuple[int, float]) -> list[Record]:
        return runs(label, flops, validation=curve(*points))

    records = [
        *curved("sparse-upcycling", 1000, (0, 4.0), (100, 1.0)),
        *curved("dense", 800, (0, 4.0), (100, 2.0)),
        *curved("quick", 1200, (0, 4.0), (50, 1.5), (100, 1.2)),
        *runs("without", 1000),
    ]
    (board,) = build(records)
    rows = {row.label: row for row in board.rows}
    assert rows["quick"].targets["dense"].steps == pytest.approx(40)
    assert rows["quick"].targets["dense"].ratio == pytest.approx(0.4 * 1200 / 800)
    assert rows["quick"].targets["sparse-upcycling"] == Target(None, None, None, 3)
    assert rows["dense"].targets["dense"].ratio == 1
    assert rows["without"].targets == {}
    text = render([board], "md")
    assert "| to dense | to sparse-upcycling |" in text
    assert "40 steps, 0.60x | not reached" in text
    line = next(each for each in csv.DictReader(io.StringIO(render([board], "csv"))) if each["label"] == "quick")
    assert float(line["to dense ratio"]) == pytest.approx(0.6)
