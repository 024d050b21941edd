"""A tuned row that follows its protocol's rule passes; each way to leave the rule has its line."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.reporting.tampering import BASE, OTHER, Files, as_tuned, fresh
from tests.reporting.test_validate import caught, checked
from upcycle_bench.record import read

Change = Callable[[dict[str, Any]], None]


def lines(folder: Path, change: Change) -> list[str]:
    """What the check `tuned` says of the record, tuned and then changed."""
    as_tuned(change)(fresh(folder))
    return caught(checked(folder)).get("tuned", [])


def test_a_row_by_the_rule_passes_and_says_which_tuning_runs_are_missing(tmp_path: Path) -> None:
    """But for the run's id, which covers the candidates, and which the untuned run had before."""
    as_tuned(lambda tree: None)(fresh(tmp_path))
    found = checked(tmp_path)
    assert caught(found).keys() == {"run-id"}
    assert [each.what for each in found.findings if each.check == "tuned"] == ["4 of its 4 tuning runs are not here"]


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
        (lambda tree: tree["seeds"].update(train=1001), "its seed 1001 is one of the tuning, which chose the options"),
        (
            lambda tree: tree["protocol"]["resolved"].pop("tuning"),
            "tuned under smoke, which has no tuning rule",
        ),
    ],
)
def test_each_way_to_leave_the_rule_is_said(tmp_path: Path, change: Change, said: str) -> None:
    assert said in lines(tmp_path, change)


def test_a_tuning_run_is_held_against_its_record(tmp_path: Path) -> None:
    """The record of another strategy under the id of a tuning run agrees in nothing but the overrides."""
    fresh(tmp_path)
    other = read(Files(tmp_path, OTHER).json)
    said = lines(tmp_path, lambda tree: part(tree)["candidates"][0]["runs"][0].update(run_id=other.run_id))
    assert said == [
        f"tuning run {other.run_id} (cluster-aware, seed 1000) has another protocol, label, configuration, seed, "
        "score, cost"
    ]


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
