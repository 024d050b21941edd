"""How far a matrix is: the state of each cell, what the running ones are at, and the time that is left.

    tally = Tally(cells, done, flops_of(cells), at_once=2)
    tally.begin(cell); tally.step(cell, "training dense", 40, 100, {"loss": "2.1"}); tally.end(cell, "done")
    tally.seconds_left()                # None while nothing has been measured

A cell takes a * FLOPs + b seconds. `a` is measured on the steps of training so far, of the same strategy where it has
some, since FLOPs of its own loss are not known; `b` on the cells that are done.
"""

from __future__ import annotations

import contextlib
import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from upcycle_bench.planning.matrix import Cell
from upcycle_bench.util.log_lines import metric_facts
from upcycle_bench.util.progress import Item, OnStep, Reporter

NONE: Mapping[str, str] = {}
State: TypeAlias = Literal["done", "running", "elsewhere", "failed", "waiting"]


@dataclass
class Entry:
    """One cell. `done` of `total` steps of `what` are done, 0 where they are not counted; `facts` are the last ones.

    `holder` is the other process that is at it.
    """

    cell: Cell
    prepare_flops: int  # at most
    train_flops: int
    state: State
    what: str = ""
    done: int = 0
    total: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)
    holder: str = ""
    began: float | None = None  # here, or when another process was first seen at it
    seconds: float | None = None  # of a cell that is done or failed
    steps: int = 0  # of the training
    first: tuple[int, float] | None = None  # a step of the training, and when it was
    last: tuple[int, float] | None = None

    @property
    def training(self) -> bool:
        """Whether `what` is the training, whose FLOPs are known, and no preparation."""
        return self.what.startswith("training ")

    def pace(self) -> tuple[int, float] | None:
        """(steps, seconds) of the training between the first and the last step that was told; None without any."""
        if self.first is None or self.last is None or self.last[0] == self.first[0]:
            return None
        return self.last[0] - self.first[0], self.last[1] - self.first[1]


class Tally:
    """The cells of a matrix in their order, of which some are done."""

    def __init__(
        self,
        cells: Sequence[Cell],
        done: Sequence[Path | None],
        flops: Mapping[str, tuple[int, int]],
        at_once: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock, self.at_once, self.began = clock, at_once, clock()
        self.entries = {
            (cell.strategy, cell.seed): Entry(cell, *flops[cell.strategy], "waiting" if path is None else "done")
            for cell, path in zip(cells, done, strict=True)
        }

    def __getitem__(self, cell: Cell) -> Entry:
        return self.entries[cell.strategy, cell.seed]

    def begin(self, cell: Cell) -> None:
        """A run starts here."""
        entry = self[cell]
        entry.state, entry.what, entry.began = "running", "starting", self.clock()

    def step(self, cell: Cell, what: str, done: int = 0, total: int = 0, facts: Mapping[str, str] = NONE) -> None:
        """A running cell is at `what`; facts that are not given stay as they were, while it is at the same."""
        entry = self[cell]
        if what != entry.what:
            entry.facts = {}
        entry.what, entry.done, entry.total, entry.facts = what, done, total, facts or entry.facts
        if entry.training and done:
            entry.steps, entry.last = total, (done, self.clock())
            entry.first = entry.first or entry.last

    def end(self, cell: Cell, state: Literal["done", "failed"]) -> None:
        """A run is over; one of another process has not begun here."""
        entry = self[cell]
        if entry.state == "running" and entry.began is not None:
            entry.seconds = self.clock() - entry.began
        entry.state = state

    def leave(self, cell: Cell, holder: str | None) -> None:
        """A cell is another process's, `holder`, or, with None, nobody's."""
        entry = self[cell]
        if holder is not None and entry.state != "elsewhere":
            entry.began = self.clock()
        entry.state, entry.holder = ("waiting", "") if holder is None else ("elsewhere", holder)

    def count(self, state: str) -> int:
        """How many cells are in that state."""
        return sum(entry.state == state for entry in self.entries.values())

    def seconds_of(self, entry: Entry) -> float | None:
        """The seconds that a cell still takes; None while that cannot be said."""
        if entry.state in ("done", "failed"):
            return 0.0
        pace, tail = entry.pace(), self._overhead()
        if entry.state == "running" and entry.training and pace and entry.last:
            return max(0.0, pace[1] / pace[0] * (entry.total - entry.last[0]) - self.clock() + entry.last[1]) + tail
        cost = self._cost(entry)
        if cost is None:
            return None
        spent = self.clock() - entry.began if entry.began is not None and entry.state != "waiting" else 0.0
        return max(0.0, cost + tail - spent)

    def seconds_left(self) -> float | None:
        """The seconds until all cells are done, `at_once` here and the others' beside them; None: not known yet."""
        left = {key: self.seconds_of(entry) for key, entry in self.entries.items()}
        if None in left.values():
            return None
        by_state: dict[State, list[float]] = {"running": [], "elsewhere": [], "waiting": []}
        for key, entry in self.entries.items():
            by_state.setdefault(entry.state, []).append(left[key] or 0.0)
        ends = by_state["running"] + by_state["elsewhere"]  # of the places, each of which takes the next cell then
        ends += [0.0] * (self.at_once - len(by_state["running"]))
        heapq.heapify(ends)
        for seconds in by_state["waiting"]:
            heapq.heappush(ends, heapq.heappop(ends) + seconds)
        return max(ends)

    def _cost(self, entry: Entry) -> float | None:
        """Seconds of a cell's preparation and training; None while no training has been measured."""
        flops = entry.prepare_flops + entry.train_flops
        if not flops:
            return 0.0
        every = self.entries.values()
        for measured in ([each for each in every if each.cell.strategy == entry.cell.strategy], every):
            seconds = done = 0.0
            for each in measured:
                if pace := each.pace():
                    seconds += pace[1]
                    done += each.train_flops * pace[0] / each.steps
            if done:
                return seconds / done * flops
        return None

    def _overhead(self) -> float:
        """Seconds of a cell beside its FLOPs: imports, evaluation."""
        over = [entry for entry in self.entries.values() if entry.state == "done" and entry.seconds is not None]
        spent = sum((entry.seconds or 0.0) - (self._cost(entry) or 0.0) for entry in over)
        return max(0.0, spent / len(over)) if over else 0.0


class Telling(Reporter):
    """Tells a tally what a run in this process says, and another reporter as well; calls `also` at each step."""

    def __init__(self, tally: Tally, cell: Cell, inner: Reporter, also: Callable[[], None] = lambda: None) -> None:
        self.tally, self.cell, self.inner, self.also = tally, cell, inner, also

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[OnStep]:
        self.tally.step(self.cell, what, 0, total)
        with self.inner.bar(what, total) as inner:

            def step(done: int, metrics: Mapping[str, float]) -> None:
                self.tally.step(self.cell, what, done, total, metric_facts(metrics))
                self.also()
                inner(done, metrics)

            yield step

    @contextlib.contextmanager
    def task(self, what: str) -> Iterator[None]:
        self.tally.step(self.cell, what)
        with self.inner.task(what):
            yield

    @contextlib.contextmanager
    def phase(self, what: str) -> Iterator[None]:
        self.tally.step(self.cell, what)
        with self.inner.phase(what):
            yield

    def track(self, items: Iterable[Item], what: str) -> Iterable[Item]:
        total = len(items) if isinstance(items, Sized) else 0
        for done, item in enumerate(self.inner.track(items, what), start=1):
            yield item
            self.tally.step(self.cell, what, done, total)

    def say(self, line: str) -> None:
        self.inner.say(line)
