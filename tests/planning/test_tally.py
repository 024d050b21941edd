"""The tally of a matrix: states, and the time left from FLOPs and what was measured so far, by hand-worked numbers."""

from pathlib import Path
from typing import Any

import pytest

from upcycle_bench.planning.tally import Entry, Tally, Telling
from upcycle_bench.util.progress import Reporter


class Cell:
    """A cell as the tally sees it: a row and a column."""

    def __init__(self, strategy: str, seed: int) -> None:
        self.strategy, self.seed = strategy, str(seed)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def matrix(seeds: int, at_once: int = 1, **flops: tuple[int, int]) -> tuple[Tally, list[Any], Clock]:
    cells: list[Any] = [Cell(name, seed) for seed in range(seeds) for name in flops]
    clock = Clock()
    return Tally(cells, [None] * len(cells), flops, at_once, clock), cells, clock


def train(tally: Tally, cell: Any, clock: Clock, first: int, last: int, total: int, pace: float) -> None:
    tally.step(cell, f"training {cell.strategy}", first, total)
    clock.now += (last - first) * pace
    tally.step(cell, f"training {cell.strategy}", last, total, {"loss": "2.1"})


def test_nothing_is_said_before_anything_is_measured() -> None:
    tally, (first, second), clock = matrix(2, a=(0, 100))
    tally.begin(first)
    tally.step(first, "training a", 1, 10)
    assert tally.seconds_left() is None
    clock.now += 4
    tally.step(first, "training a", 3, 10)
    # 2 s a step: 7 steps are left here, and the second has 10 steps' worth of FLOPs.
    assert tally.seconds_left() == 14 + 20
    clock.now += 1  # also between two lines
    assert tally.seconds_left() == 13 + 20
    assert tally.seconds_of(tally[second]) == 20


def test_a_cell_that_is_done_tells_what_it_takes_beside_its_flops() -> None:
    tally, (first, second), clock = matrix(2, a=(0, 100))
    tally.begin(first)
    clock.now += 5  # imports
    train(tally, first, clock, 1, 10, 10, 1.0)
    tally.step(first, "evaluating")
    clock.now += 6
    tally.end(first, "done")
    # 20 s, of which 10 for its FLOPs: 9 steps took 9 s.
    assert tally.seconds_left() == 20
    tally.begin(second)
    clock.now += 3
    assert tally.seconds_left() == 17
    train(tally, second, clock, 1, 2, 10, 3.0)  # its own pace counts now: 8 steps of 3 s, and the 10 s beside
    assert tally.seconds_left() == pytest.approx(8 * 3.0 + tally._overhead())
    clock.now += 1000
    tally.step(second, "evaluating")
    assert tally.seconds_left() == 0  # it takes longer than was thought


def test_a_strategys_own_pace_counts_before_that_of_others() -> None:
    """Its own loss has FLOPs that nobody counts."""
    tally, (a, slow, b, slower), clock = matrix(2, plain=(0, 100), teacher=(0, 100))
    for cell, pace in ((a, 1.0), (slow, 5.0)):
        tally.begin(cell)
        train(tally, cell, clock, 0, 5, 10, pace)
        train(tally, cell, clock, 5, 10, 10, pace)
    assert tally._cost(tally[b]) == pytest.approx(10.0)
    assert tally._cost(tally[slower]) == pytest.approx(50.0)
    other = Entry(a, 100, 100, "waiting")  # with a preparation, of a third strategy: the mean pace
    other.cell = Cell("third", 0)  # type: ignore[assignment]
    assert tally._cost(other) == pytest.approx(2 * 30.0)


def test_cells_at_once_share_the_time() -> None:
    """Places take the next cell as they become free: 2 places and 3 cells of 20 s, of which two have 14 s to go."""
    tally, cells, clock = matrix(3, at_once=2, a=(0, 100))
    for cell in cells[:2]:
        tally.begin(cell)
        tally.step(cell, "training a", 1, 10)
    clock.now += 4
    for cell in cells[:2]:
        tally.step(cell, "training a", 3, 10)
    assert tally.seconds_left() == 14 + 20
    tally.leave(cells[2], "process 1 on b")
    assert tally.seconds_left() == 20  # another command is at it
    clock.now += 5
    assert tally.seconds_left() == 15
    tally.leave(cells[2], None)
    assert tally.seconds_left() == 9 + 20


def test_a_control_without_training_takes_what_others_take_beside_theirs() -> None:
    tally, (first, second), clock = matrix(2, frozen=(0, 0))
    assert tally.seconds_left() == 0
    tally.begin(first)
    clock.now += 12
    tally.end(first, "done")
    assert tally.seconds_left() == 12
    tally.begin(second)
    clock.now += 2
    tally.end(second, "failed")
    assert (tally.seconds_left(), tally.count("failed"), tally.count("done")) == (0, 1, 1)


def test_done_before_is_done() -> None:
    cells: list[Any] = [Cell("a", 0), Cell("a", 1)]
    tally = Tally(cells, [Path("record.json"), None], {"a": (0, 1)})
    assert [tally.count(state) for state in ("done", "waiting")] == [1, 1]


def test_a_preparation_is_no_training() -> None:
    """Its steps have another pace."""
    tally, (cell,), clock = matrix(1, btx=(50, 100))
    tally.begin(cell)
    tally.step(cell, "preparing btx: branch 1", 1, 10)
    clock.now += 9
    tally.step(cell, "preparing btx: branch 1", 10, 10)
    assert tally.seconds_left() is None
    assert (tally[cell].what, tally[cell].done, tally[cell].total) == ("preparing btx: branch 1", 10, 10)


def test_a_run_in_this_process_tells_its_tally_and_another_reporter() -> None:
    said: list[str] = []

    class Inner(Reporter):
        def say(self, line: str) -> None:
            said.append(line)

    tally, (cell,), clock = matrix(1, a=(0, 100))
    looks: list[int] = []
    reporter = Telling(tally, cell, Inner(), lambda: looks.append(1))
    tally.begin(cell)
    with reporter.bar("training a", 10) as step:
        assert (tally[cell].what, tally[cell].done, tally[cell].total) == ("training a", 0, 10)
        step(1, {"step": 1, "loss": 2.5, "samples_per_second": 100.4})
        clock.now += 1
        step(2, {})
    entry = tally[cell]
    assert (entry.done, entry.facts, entry.pace()) == (2, {"loss": "2.5000", "images/s": "100"}, (1, 1.0))
    assert len(looks) == 2
    with reporter.phase("evaluating"):
        assert (entry.what, entry.done, entry.facts) == ("evaluating", 0, {})
        assert list(reporter.track([7, 8], "encoding")) == [7, 8]
        assert (entry.what, entry.done, entry.total) == ("encoding", 2, 2)
        with reporter.task("certificate"):
            assert entry.what == "certificate"
    reporter.say("hello")
    assert said == ["hello"]
