"""Trackers get every line of metrics and the scores, go on after an interruption, and never end a run."""

import csv
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import QUICK
from tests.test_run import plan
from upcycle_bench import record, run
from upcycle_bench.planning.fingerprint import fingerprint
from upcycle_bench.planning.identity import run_facts
from upcycle_bench.training.trackers import Csv, Tracked, Trackers, require
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.progress import Reporter

Row = dict[str, Any]


def line(step: int, **more: Any) -> Row:
    return {"step": step, "loss": float(step), **more}


@pytest.fixture
def tracked(tmp_path: Path) -> Tracked:
    return Tracked(name="dense 0/0", id="0123456789abcdef", group="smoke", folder=tmp_path / "run", config={"seed": 0})


def session(tracked: Tracked, names: list[str], start: int, lines: list[Row], scores: dict[str, float]) -> None:
    """One session of a training that begins after `start` steps."""
    with Trackers(names, tracked) as trackers:
        trackers.begin(start)
        for each in lines:
            trackers.log(each)
        if scores:
            trackers.scores(scores, step=lines[-1]["step"])


def interrupted(tracked: Tracked, name: str) -> None:
    """Ten steps with a checkpoint after six, then the rest again from there, with another term, and a score."""
    session(tracked, [name], 0, [line(step) for step in (1, 4, 6, 8, 10)], {})
    again = [line(step, loss=100.0 + step, extra=0.5) for step in (8, 10, 12)]
    session(tracked, [name], 6, again, {"in-distribution": 0.25})


# ---- each client -------------------------------------------------------------------------------------------------


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_is_cut_to_the_checkpoint_and_takes_new_columns(tracked: Tracked) -> None:
    interrupted(tracked, "csv")
    found = rows(tracked.folder)
    assert [(row["step"], row["loss"]) for row in found] == [
        ("1", "1.0"), ("4", "4.0"), ("6", "6.0"), ("8", "108.0"), ("10", "110.0"), ("12", "112.0"), ("12", ""),
    ]  # fmt: skip
    assert [row["extra"] for row in found] == ["", "", "", "0.5", "0.5", "0.5", ""]
    assert found[-1]["score/in-distribution"] == "0.25"
    session(tracked, ["csv"], 0, [line(1)], {})  # --fresh
    assert rows(tracked.folder) == [{"step": "1", "loss": "1.0"}]


def test_csv_keeps_no_rows_in_memory(tracked: Tracked) -> None:
    """A new column comes to the rows that stand in the file."""
    with Trackers(["csv"], tracked) as trackers:
        trackers.begin(0)
        trackers.log(line(1))
        file = tracked.folder / "metrics.csv"
        file.write_text(file.read_text().replace("1.0", "7.0"))
        trackers.log(line(2, extra=0.5))
    assert [(row["loss"], row["extra"]) for row in rows(tracked.folder)] == [("7.0", ""), ("2.0", "0.5")]


def test_tensorboard_hides_what_follows_the_checkpoint(tracked: Tracked) -> None:
    """As TensorBoard itself reads it."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    interrupted(tracked, "tensorboard")
    events = accumulator.EventAccumulator(str(tracked.folder)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(1, 1.0), (4, 4.0), (6, 6.0), (8, 108.0), (10, 110.0), (12, 112.0)]
    assert [(event.step, event.value) for event in events.Scalars("score/in-distribution")] == [(12, 0.25)]


class FakeWandb(SimpleNamespace):
    """What of wandb is used; `runs` are those that were begun."""

    def __init__(self) -> None:
        self.runs: list[Any] = []
        self.Settings = dict

    def init(self, **given: Any) -> Any:
        run = SimpleNamespace(given=given, lines=[], over=False, define_metric=lambda *_, **__: None)
        run.log = run.lines.append
        run.finish = lambda: setattr(run, "over", True)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "spool"))
    return fake


def test_wandb_goes_on_in_the_same_run(wandb: FakeWandb, tracked: Tracked, tmp_path: Path) -> None:
    interrupted(tracked, "wandb")
    first, second = wandb.runs
    assert first.given["id"] == second.given["id"] and first.given["id"].startswith("0123456789ab-")
    assert (first.given["resume"], first.given["name"], first.given["group"]) == ("allow", "dense 0/0", "smoke")
    assert first.given["config"] == {"seed": 0} and first.given["dir"] == str(tmp_path / "spool")
    assert second.lines[0] == {"step": 8, "loss": 108.0, "extra": 0.5}
    assert second.lines[-1] == {"step": 12, "score/in-distribution": 0.25}
    assert first.over and second.over


# ---- all of them -------------------------------------------------------------------------------------------------


def test_numbers_of_layers_are_named_by_their_place(tracked: Tracked) -> None:
    layers = {"vision.1": {"load": [0.25, 0.75], "router_entropy": 1.5, "relative_compactness": None}}
    session(tracked, ["csv"], 0, [line(1, layers=layers, bad_samples=2)], {})
    expected = {"vision.1/load/0": "0.25", "vision.1/load/1": "0.75", "vision.1/router_entropy": "1.5"}
    assert rows(tracked.folder) == [{"step": "1", "loss": "1.0", "bad_samples": "2", **expected}]


def test_a_tracker_that_fails_is_one_warning(
    wandb: FakeWandb, tracked: Tracked, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its start, as without a network, and later; the others go on."""

    def unreachable(**_: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(wandb, "init", unreachable)
    session(tracked, ["wandb", "csv"], 0, [line(1), line(2)], {"score": 1.0})
    err = capsys.readouterr().err
    assert err == "warning: the tracker wandb failed and is left out from here on: no route to host\n"
    assert len(rows(tracked.folder)) == 3

    def full(self: Csv, step: int, values: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Csv, "log", full)
    session(tracked, ["csv"], 0, [line(1), line(2)], {})
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    require(["csv"])
    with pytest.raises(UserError, match=r"unknown tracker 'tensorbord': did you mean 'tensorboard'"):
        require(["csv", "tensorbord"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--track wandb: .*pip install 'upcycle-bench\[wandb\]'\.$"):
        require(["csv", "wandb"])


def test_a_run_is_tracked_beside_its_record(tmp_path: Path) -> None:
    """Lines and scores are those of the record; without a training the scores come alone."""
    planned = plan("dense", QUICK, train_seed=71)
    for number in (1, 2):
        run.run(planned, tmp_path, Reporter(), track=["csv"])
        (folder,) = (tmp_path / "smoke" / "tracking").iterdir()
        made = [record.read(path) for path in record.record_paths(tmp_path)]
        identity = fingerprint(run_facts(planned))  # the same on other ranks, unlike the record's run_id
        assert len(made) == number and folder.name == f"dense-i0-t71-{identity[:8]}"
    lines = rows(folder)
    assert [row["step"] for row in lines if row["loss"]] == ["1", "4"]
    value = made[0].headlines["in-distribution"].value
    assert [float(row["score/in-distribution"]) for row in lines if row["score/in-distribution"]] == [value, value]
    assert made[0].validation is not None
    curve = [(int(row["step"]), float(row["validation_log_rank"])) for row in lines if row["validation_log_rank"]]
    assert curve == [(step, pytest.approx(score)) for step, score in made[0].validation.points]
