"""Two commands share a matrix: nothing is done twice, nobody waits idly, and what a dead one was at goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_run import plan
from upcycle_bench import record, run_queue
from upcycle_bench.planning.identity import run_facts
from upcycle_bench.planning.matrix import Cell
from upcycle_bench.planning.tally import Tally
from upcycle_bench.run_queue import Outcome, Queue
from upcycle_bench.training import claims
from upcycle_bench.training.claims import Claims
from upcycle_bench.training.work_folder import folder_of
from upcycle_bench.util import distributed
from upcycle_bench.util.cache import cache_root, locked
from upcycle_bench.util.errors import UserError

LONG = ["--set", "dense.schedule.steps=12", "--set", "dense.schedule.batch_size=32"]
LONG += ["--set", "train.schedule.batch_size=32"]


def cells(quick: list[str], *seeds: int) -> list[Cell]:
    return [Cell(plan=plan("dense-frozen", quick, init_seed=seed, train_seed=seed)) for seed in seeds]


def queue_of(todo: list[Cell], results: Path, looked_at: tuple[Path, ...] = ()) -> Queue:
    tally = Tally(todo, [None] * len(todo), {cell.strategy: (0, 1) for cell in todo})
    return Queue(todo, results, tally, looked_at)


def folder(cell: Cell) -> Path:
    return folder_of(run_facts(cell.plan))


# ---- within one process ------------------------------------------------------------------------------------------


def test_a_cell_of_another_is_passed_over_and_comes_back(tmp_path: Path, quick: list[str]) -> None:
    todo, others = cells(quick, 1, 2), Claims()
    queue = queue_of(todo, tmp_path)
    assert others.take(folder(todo[0]))
    assert queue.next() is todo[1]
    assert queue.next() is None and queue.waiting == [todo[0]]
    entry = queue.tally[todo[0]]
    assert (entry.state, entry.holder) == ("elsewhere", f"process {os.getpid()} on {os.uname().nodename}")
    assert not others.take(folder(todo[1]))  # it is ours
    others.release(folder(todo[0]))
    assert queue.next() is todo[0] and not queue.waiting
    assert [queue.tally[cell].state for cell in todo] == ["running", "running"]
    queue.end(todo[1], Outcome(cell=todo[1], reason="it broke"))
    assert queue.tally[todo[1]].state == "failed"
    assert others.take(folder(todo[1])) and not others.take(folder(todo[0]))
    others.close()
    queue.close()
    assert others.take(folder(todo[0])) and queue.tally[todo[0]].state == "waiting"
    others.close()


def test_a_single_run_counts_as_another(tmp_path: Path, quick: list[str]) -> None:
    """It has no claim, and its work folder is locked."""
    todo, others = cells(quick, 3), Claims()
    queue = queue_of(todo, tmp_path)
    with locked(folder(todo[0])):
        assert queue.next() is None
    assert others.take(folder(todo[0]))  # a try leaves nothing held
    others.close()
    assert queue.next() is todo[0]
    queue.close()


@pytest.mark.parametrize("status", ["ok", "failed"])
def test_what_another_has_made_meanwhile_is_the_outcome(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    todo = cells(quick, 4, 5)
    path = tmp_path / "theirs.json"
    theirs = type("Made", (), {"reason": None if status == "ok" else "singular matrix"})()
    monkeypatch.setattr(record, "read", lambda path: theirs)
    found = {("ok", "4"): path} if status == "ok" else {("failed", "4"): path}
    monkeypatch.setattr(run_queue, "finished_before", lambda these, *_: [found.get(("ok", these[0].seed))])
    monkeypatch.setattr(
        run_queue, "newest_of", lambda cell, *rest: (path, theirs) if (rest[-1], cell.seed) in found else None
    )
    queue = queue_of(todo, tmp_path)
    assert queue.next() is todo[1] and not queue.waiting
    (outcome,) = queue.outcomes
    assert (outcome.cell, outcome.path, outcome.reason, outcome.ran) == (todo[0], path, theirs.reason, False)
    assert queue.tally[todo[0]].state == ("done" if status == "ok" else "failed")
    others = Claims()
    assert others.take(folder(todo[0])) and not others.take(folder(todo[1]))
    others.close()
    queue.close()


def test_rank_0_decides_for_all_ranks(tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank takes no lock: it is told the number of the cell."""
    todo = cells(quick, 6, 7)
    told: list[Any] = [(1, None, None), None, (0, tmp_path / "theirs.json", None)]
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "from_main", lambda value: told.pop(0) if value is None else pytest.fail("a lock"))
    queue = queue_of(todo, tmp_path)
    assert queue.next() is todo[1]
    assert queue.next() is None and queue.waiting == [todo[0]]
    told.append(None)
    assert queue.next() is None and not queue.waiting
    assert [(outcome.cell, outcome.path, outcome.made) for outcome in queue.outcomes] == [
        (todo[0], tmp_path / "theirs.json", None)
    ]
    queue.close()
    assert Claims().take(folder(todo[0]))


def test_what_others_are_at_is_seen_without_a_try(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    todo, others = cells(quick, 8, 9), Claims()
    queue = queue_of(todo, tmp_path)
    others.take(folder(todo[1]))
    queue.look()
    assert queue.tally[todo[1]].state == "waiting"  # it has looked a moment ago
    monkeypatch.setattr(run_queue, "LOOK", 0.0)
    queue.look()
    assert [queue.tally[cell].state for cell in todo] == ["waiting", "elsewhere"]
    others.release(folder(todo[1]))
    queue.look()
    assert queue.tally[todo[1]].state == "waiting"  # it ended without a record
    others.take(folder(todo[1]))
    queue.look()
    others.close()
    monkeypatch.setattr(queue, "made_meanwhile", lambda cell: tmp_path)
    queue.look()
    queue.look()
    assert queue.tally[todo[1]].state == "done" and queue.waiting == todo
    queue.close()


def test_a_cache_that_cannot_be_written_is_said_before_the_first_run(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not in the middle of one: nothing is opened later."""
    todo = cells(quick, 10, 11)
    queue = queue_of(todo, tmp_path)
    monkeypatch.setattr(claims, "attempt", lambda path: pytest.fail("a lock that is made while a run goes on"))
    monkeypatch.setattr(run_queue, "LOOK", 0.0)
    assert queue.next() is todo[0]
    queue.look()
    queue.close()
    monkeypatch.undo()
    (tmp_path / "file").touch()
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write to the cache folder"):
        queue_of(todo, tmp_path)


def test_a_look_that_takes_long_has_its_pause(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands in the training's loop: the pause begins at its end, whether it fails or not."""
    queue, now, looks = queue_of(cells(quick, 12), tmp_path), [time.monotonic() + 1000], list[float]()

    def slow(self: Claims, folder: Path) -> None:
        looks.append(now[0])
        now[0] += 60
        raise OSError("a stale file handle")

    monkeypatch.setattr(Claims, "seen", slow)
    monkeypatch.setattr(run_queue, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
    with pytest.raises(OSError, match="stale"):
        queue.look()
    queue.look()
    assert len(looks) == 1
    now[0] += run_queue.LOOK
    with pytest.raises(OSError, match="stale"):
        queue.look()
    queue.close()


# ---- two commands ------------------------------------------------------------------------------------------------


class Command:
    """`upcycle-bench run` in a process of its own, whose stderr is a file."""

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        self.log = folder / f"{name}.log"
        with self.log.open("w") as file:
            command = [sys.executable, "-m", "upcycle_bench", "run", "-p", "smoke", *arguments]
            self.process = subprocess.Popen(
                [*command, "--results", str(folder / "results")], stdout=subprocess.DEVNULL, stderr=file
            )

    def err(self) -> str:
        return self.log.read_text()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def begin(name: str, *arguments: str) -> Command:
        started.append(Command(tmp_path, name, *arguments))
        return started[-1]

    yield begin
    for command in started:
        command.process.kill()
        command.process.wait()


def until(what: Callable[[], Any], *commands: Command, seconds: float = 120) -> Any:
    """The first true value of `what`; the commands' stderr where it does not come."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "\n".join(command.err() for command in commands)
        time.sleep(0.02)
    return found


def made(results: Path) -> list[tuple[str, int, str]]:
    records = [record.read(path) for path in results.rglob("*.json")]
    return sorted((each.strategy.label, each.seeds.train, each.status) for each in records)


def checkpoints() -> list[Path]:
    return list((cache_root() / "runs").glob("*/checkpoints/step*"))


def test_two_share_a_matrix_and_one_goes_on_with_what_a_killed_one_was_at(
    tmp_path: Path, start: Callable[..., Command]
) -> None:
    """The first stands still in a cell and so keeps it; the second does all others, waits, and then resumes it."""
    arguments = ["-s", "dense", "--seed", "61", "--seeds", "3", *LONG, "--set", "train.schedule.steps=24"]
    arguments += ["--set", "train.checkpoint_every=4"]
    first = start("first", *arguments)
    until(lambda: "start training dense" in first.err() and checkpoints(), first)
    first.process.send_signal(signal.SIGSTOP)
    second = start("second", *arguments)
    until(lambda: "waiting for what others run: dense seed 61 (process" in second.err(), first, second)
    assert made(tmp_path / "results") == [("dense", 62, "ok"), ("dense", 63, "ok")]
    assert f"process {first.process.pid} on" in second.err()
    first.process.kill()
    first.process.wait()  # a zombie would count as living, for the 60 s of its lease
    assert second.process.wait(120) == 0, second.err()
    assert "an interrupted training goes on from step" in second.err()
    assert made(tmp_path / "results") == [("dense", seed, "ok") for seed in (61, 62, 63)]
    assert not checkpoints()


def test_two_at_once_make_each_record_once(tmp_path: Path, start: Callable[..., Command]) -> None:
    arguments = ["-s", "dense-frozen,dense", "--seed", "64", "--seeds", "2", *LONG, "--set", "train.schedule.steps=8"]
    both = [start("first", *arguments), start("second", *arguments, "--jobs", "2")]
    for command in both:
        assert command.process.wait(180) == 0, command.err()
    names = ("dense", "dense-frozen")
    assert made(tmp_path / "results") == [(name, seed, "ok") for name in names for seed in (64, 65)]


def test_processes_of_a_killed_command_stop_with_a_checkpoint(tmp_path: Path, start: Callable[..., Command]) -> None:
    arguments = ["-s", "dense", "--seed", "66", "--seeds", "2", *LONG, "--set", "train.schedule.steps=100000"]
    first = start("first", *arguments, "--jobs", "2")
    until(lambda: len(list((cache_root() / "runs").glob("*/metrics.jsonl"))) == 2, first)
    children = [
        int(pid) for pid in Path(f"/proc/{first.process.pid}/task/{first.process.pid}/children").read_text().split()
    ]
    assert len(children) == 2
    first.process.kill()
    until(
        lambda: (
            not any(
                Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text() for pid in children
            )
        ),
        first,
    )
    assert len(checkpoints()) == 2
    assert made(tmp_path / "results") == []
    for path in checkpoints():
        path.parents[1].rename(tmp_path / path.parents[1].name)
