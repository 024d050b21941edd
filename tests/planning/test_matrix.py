"""The matrix: its cells, and which of them are done."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.records import make_record, tuned_part
from upcycle_bench import record
from upcycle_bench.planning.matrix import (
    Cell,
    describes,
    enumerate_cells,
    newest_record,
    read_records,
    seed_pairs,
    strategy_names,
)
from upcycle_bench.planning.plan import Plan
from upcycle_bench.planning.registry import Entry, Registry
from upcycle_bench.record import TunedPart
from upcycle_bench.util.errors import UserError

# ---- enumeration -------------------------------------------------------------------------------------------------


def entry(name: str, status: str) -> Entry:
    return Entry(name, SimpleNamespace(info=SimpleNamespace(status=status)), "package", "1")


def planned(label: str) -> Plan:
    """A plan with the parts that the matrix reads; they fit the protocol of `make_record`."""
    return Plan(
        protocol=SimpleNamespace(name="smoke", division="closed"),  # type: ignore[arg-type]
        entry=entry(label, "control"),
        strategy=None,  # type: ignore[arg-type]
        moe=None,  # type: ignore[arg-type]
        steps=4,
        label=label,
        suites={},
        init_seed=0,
        train_seed=0,
        world=None,
        checkpoint=None,
        dense_identity="dense",
        training_fingerprint="train-fingerprint",
        suite_fingerprints={"zero-shot": "suite-fingerprint"},
        skipped={},
        missing=(),
    )


REGISTRY = Registry(
    {
        name: entry(name, status)
        for name, status in (
            ("aimed", "published"),
            ("dense", "control"),
            ("moved", "unpublished"),
            ("scratch", "control"),
        )
    }
)


@pytest.mark.parametrize(
    ("text", "names"),
    [("all", ["dense", "scratch", "aimed", "moved"]), ("moved", ["moved"]), ("moved, dense", ["moved", "dense"])],
)
def test_strategy_names(text: str, names: list[str]) -> None:
    assert strategy_names(REGISTRY, text) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dense,mved", "did you mean 'moved'"),
        ("dense,", "unknown"),
        ("dense,dense", "twice"),
        ("all,dense", "stands alone"),
    ],
)
def test_bad_strategy_names(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        strategy_names(REGISTRY, text)


def test_seed_pairs() -> None:
    assert seed_pairs(0, 1) == [(0, 0)]
    assert seed_pairs(3, 2) == [(3, 3), (4, 4)]
    assert seed_pairs(3, 2, init_seed=0) == [(0, 3), (0, 4)]
    assert seed_pairs(3, 2, train_seed=0) == [(3, 0), (4, 0)]
    assert seed_pairs(3, 1, init_seed=1, train_seed=2) == [(1, 2)]
    with pytest.raises(UserError, match="--seeds 2 leaves nothing to vary"):
        seed_pairs(3, 2, init_seed=1, train_seed=2)


def test_cells_go_seed_by_seed() -> None:
    cells = enumerate_cells([planned("dense"), planned("moved")], [(0, 0), (0, 1)])
    assert [(cell.strategy, cell.seed) for cell in cells] == [
        ("dense", "0"),
        ("moved", "0"),
        ("dense", "0/1"),
        ("moved", "0/1"),
    ]


# ---- what is done ------------------------------------------------------------------------------------------------

CELL = Cell(plan=planned("dense"))


def test_the_newest_record_of_a_cell_is_found_by_its_content() -> None:
    older, newer = make_record(run_id="the-same"), make_record(run_id="the-same", created="2026-01-03T00:00:00Z")
    assert newest_record(CELL, "the-same", {}) is None
    assert newest_record(CELL, "the-same", {Path("z.json"): older, Path("a.json"): newer}) == Path("a.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": "another-one"},
        {"status": "failed", "reason": "out of memory"},
        {"protocol": {"suite_fingerprints": {"zero-shot": "another"}}},
        {"protocol": {"suite_fingerprints": {"zero-shot": "suite-fingerprint", "few-shot": "another"}}},
        {"protocol": {"name": "lab"}},
        {"protocol": {"division": "open"}},
        {"seeds": {"init": 1}},
        {"seeds": {"train": 1}},
    ],
    ids=str,
)
def test_a_record_of_other_content_is_not_the_cells(changes: dict[str, Any]) -> None:
    made = make_record(**({"run_id": "the-same"} | changes))
    assert newest_record(CELL, "the-same", {Path("r.json"): made}) is None


def test_files_that_are_no_records_do_not_count(tmp_path: Path) -> None:
    assert read_records(tmp_path / "nowhere") == {}
    (tmp_path / "notes.json").write_text("{}")
    path = record.write(make_record(), None, tmp_path)
    assert list(read_records(tmp_path)) == [path]
    assert read_records(tmp_path, {path}) == {}


def test_a_row_of_another_tuning_is_another_run() -> None:
    parts = [TunedPart.model_validate(tuned_part(("moved", [value]))) for value in (0.5, 0.6)]
    made = make_record("moved[tuned]", strategy={"tuned": parts[0].model_dump()})
    found = [describes(made, Cell(plan=replace(planned("moved"), tuned=part))) for part in (*parts, None)]
    assert found == [True, False, False]
