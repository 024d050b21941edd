"""A tuned row that follows its protocol's rule passes; each way to leave the rule has its line."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.records import make_record, tuned_part
from tests.reporting.tampering import BASE, LAB, Files, as_tuned, fresh
from tests.reporting.test_validate import caught, checked
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.record import Record
from upcycle_bench.reporting.checks_tuned import over_all
from upcycle_bench.reporting.sent import Sent, Unchecked

Change = Callable[[dict[str, Any]], None]


def lines(folder: Path, change: Change) -> list[str]:
    """What the check `tuned` says of the record, tuned and then changed."""
    as_tuned(change)(fresh(folder))
    return caught(checked(folder)).get("tuned", [])


MISSING = "4 of its 4 tuning runs are not here; send the records of the tuning runs, too"


def test_a_row_by_the_rule_lacks_only_its_tuning_runs(tmp_path: Path) -> None:
    """And the run's id, which covers the candidates, and which the untuned run had before."""
    as_tuned(lambda tree: None)(fresh(tmp_path))
    found = caught(checked(tmp_path))
    assert found.keys() == {"run-id", "tuned"} and found["tuned"] == [MISSING]


def part(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tree["strategy"]["tuned"]
    return found


def more_candidates(tree: dict[str, Any]) -> None:
    for number in range(3):
        other = copy.deepcopy(part(tree)["candidates"][1])
        part(tree)["candidates"].append(other | {"label": f"cluster-aware[tau=0.{number}]"})


def another_wins(tree: dict[str, Any]) -> None:
    for run in part(tree)["candidates"][1]["runs"]:
        run["value"] = 0.001


def no_defaults(tree: dict[str, Any]) -> None:
    part(tree)["candidates"].reverse()


def own_rule(tree: dict[str, Any]) -> None:
    tree["protocol"]["resolved"]["tuning"]["candidates"] = 100


def other_seeds(tree: dict[str, Any]) -> None:
    part(tree)["seeds"] = [5, 6]
    for candidate in part(tree)["candidates"]:
        for seed, run in zip((5, 6), candidate["runs"], strict=True):
            run["seed"] = seed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (more_candidates, "5 candidates, the rule allows 4"),
        (another_wins, "its options are not those of the best candidate, cluster-aware[tau=0.8]"),
        (no_defaults, "its first candidate does not have the protocol's defaults: it is cluster-aware[tau=0.8]"),
        (
            lambda tree: part(tree)["candidates"][1]["config"].update(tau=0.7),
            "the options of candidate cluster-aware[tau=0.8] give cluster-aware[tau=0.7]",
        ),
        (own_rule, "its tuning rule is not the one of protocol smoke here"),
        (other_seeds, "protocol, headline score, rule or seeds of its tuning are not those of its protocol's rule"),
        (
            lambda tree: part(tree)["candidates"][1]["runs"][0].update(flops=None),
            "FLOPs of its tuning runs are missing, though its own are counted",
        ),
        (lambda tree: tree["seeds"].update(train=1001), "its seed 1001 is one of the tuning, which chose the options"),
        (
            lambda tree: tree["protocol"]["resolved"].pop("tuning"),
            "tuned under smoke, which has no tuning rule",
        ),
    ],
)
def test_each_way_to_leave_the_rule_is_said(tmp_path: Path, change: Change, said: str) -> None:
    assert said in lines(tmp_path, change)


def test_the_id_of_a_tuning_run_follows_from_the_row(tmp_path: Path) -> None:
    """A run of `lab` as if its own defaults had been tuned on its own seed: then the tuning run has the id it had."""
    files = Files(fresh(tmp_path), LAB)
    strategy, real = files.tree["strategy"], files.tree["run_id"]
    tuning = load_protocol(load_registry().protocols["lab"].target).model_dump(mode="json")["tuning"]
    files.tree["protocol"]["resolved"]["tuning"] = tuning
    run = {"run_id": real, "seed": 0, "value": 1.0, "flops": 1, "seconds": 1.0}
    candidate = {"label": strategy["label"], "config": strategy["config"], "runs": [run]}
    rule = {key: tuning[key] for key in ("protocol", "headline", "rule")} | {"seeds": [0], "higher_is_better": False}
    strategy |= {"label": f"{strategy['label']}[tuned]", "tuned": {**rule, "candidates": [candidate]}}
    files.write()
    assert not any("trained as this row" in what for what in caught(checked(tmp_path))["tuned"])
    run["run_id"] = "0123456789abcdef"
    files.write()
    assert (
        "tuning run 0123456789abcdef is not sparse-upcycling with seed 0, trained as this row: that is " + real
        in caught(checked(tmp_path))["tuned"]
    )


# ---- several records -----------------------------------------------------------------------------------------------

numbers = itertools.count()


def sent(record: Record) -> Sent:
    return Sent(Path(f"{next(numbers)}.json"), record, b"", {}, None, None)


def row(value: float = 0.5, **changes: Any) -> Record:
    """A tuned row with one candidate, and one tuning run of id `0234567-0`."""
    return make_record("new[tuned]", strategy={"tuned": tuned_part(("new", [value]))}, **changes)


def tuning_run(**changes: Any) -> Record:
    """The record of that tuning run; `changes` as of `make_record`."""
    cost = {"phases": {"train": {"seconds": 2.0, "flops": 1_000, "peak_memory_bytes": 1}}}
    usual = {"run_id": "0234567-0", "cost": cost, "protocol": {"name": "smoke-dev"}}
    usual["strategy"] = {"config": {"options of": "new"}}
    return make_record("new", init=1000, train=1000, **{"value": 0.5, **usual, **changes})


RERUN = {"value": 0.51}
FAILED = {"status": "failed", "reason": "it diverged", "value": None}
ELSEWHERE = {"protocol": {"name": "smoke"}, "value": 0.9}


def said(*records: Record) -> list[str]:
    return [str(what) for _, what in over_all([sent(record) for record in records])]


@pytest.mark.parametrize("other", [RERUN, FAILED, ELSEWHERE])
def test_a_tuning_run_agrees_with_one_of_its_records(other: dict[str, Any]) -> None:
    """It was made again with another rounding, or failed then, or was scored under another protocol, too."""
    assert said(row(), tuning_run()) == []
    assert said(row(), tuning_run(), tuning_run(**other)) == said(row(), tuning_run(**other), tuning_run()) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (RERUN, "score"),
        ({"strategy": {"config": {}}}, "configuration"),
        ({"seeds": {"init": 1000, "train": 3}}, "seed"),
        ({"cost": {}}, "cost"),
    ],
)
def test_a_tuning_run_is_held_against_its_record(change: dict[str, Any], what: str) -> None:
    assert said(row(), tuning_run(**change)) == [f"tuning run 0234567-0 (new, seed 1000) has another {what}"]


@pytest.mark.parametrize("others", [[], [FAILED], [ELSEWHERE]])
def test_a_closed_row_needs_the_records_of_its_tuning_runs(others: list[dict[str, Any]]) -> None:
    made = [tuning_run(**other) for other in others]
    missing = "1 of its 1 tuning runs are not here"
    assert said(row(), *made) == [f"{missing}; send the records of the tuning runs, too"]
    ((_, what),) = over_all([sent(row(protocol={"division": "open", "overrides": ("threads=2",)}))])
    assert isinstance(what, Unchecked) and what == missing


def test_a_strategy_has_one_tuned_row_in_a_table() -> None:
    newer = row(0.4, train=1, created="2026-01-03T03:04:05Z")
    runs = [tuning_run(), tuning_run(value=0.4)]
    (what,) = said(*runs, row(), newer)
    assert what.startswith("new has one tuned row in a table, and ") and what.endswith("leave one of them out")
    assert said(*runs, row(), row(train=1)) == []  # another seed of the same choice
    elsewhere = row(0.4, protocol={"training_fingerprint": "another"})
    failed = row(0.4, status="failed", reason="no space left")
    assert said(*runs, row(), elsewhere) == said(*runs, row(), failed) == []


# ---- the record itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: part(tree)["candidates"][1].update(label="cluster-aware"), "two candidates have the same label"),
        (lambda tree: part(tree)["candidates"][1]["runs"].pop(), "was not run with the tuning seeds [1000, 1001]"),
    ],
)
def test_a_part_that_contradicts_itself_is_no_record(tmp_path: Path, change: Change, said: str) -> None:
    as_tuned(change)(fresh(tmp_path))
    assert any(said in what for what in caught(checked(tmp_path))["schema"])


def test_a_closed_record_with_options_is_readable_and_named(tmp_path: Path) -> None:
    files = Files(fresh(tmp_path), BASE)
    files.tree["strategy"] |= {
        "label": "cluster-aware[tau=0.8]",
        "config": json.loads(json.dumps(files.tree["strategy"]["config"])) | {"tau": 0.8},
    }
    files.write()
    found = checked(tmp_path)
    assert "protocol" not in caught(found) and "strategy" not in caught(found)
    said = [each.what for each in found.findings if each.check == "protocol"]
    assert said == ["it is from before options opened a run, and says closed; tables count it as open"]
