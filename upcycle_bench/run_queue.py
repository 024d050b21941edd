"""The cells of a matrix that are to do, shared with other processes that run the same matrix, also on other machines.

    with contextlib.closing(Queue(todo, results, tally, looked_at)) as queue:
        while queue.waiting:
            if (cell := queue.next()) is not None: queue.end(cell, outcome_of(...))     # else others are at all of them

A cell is held from `next` to `end` (`training.claims`). What another process has made of one meanwhile, a record or a
failed one, is its outcome here. Where its process died without a record, the cell is free again.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from upcycle_bench import record
from upcycle_bench.planning.identity import run_facts
from upcycle_bench.planning.matrix import Cell, describes, finished_before, read_records
from upcycle_bench.planning.tally import Tally
from upcycle_bench.training.claims import Claims
from upcycle_bench.training.work_folder import folder_of
from upcycle_bench.util import distributed

LOOK = 5.0  # seconds between two looks at what others are at


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a cell. A failed one has a reason, and a record unless it failed before anything ran."""

    cell: Cell
    path: Path | None = None
    made: record.Record | None = None
    reason: str | None = None
    ran: bool = True  # False: its record was there before, or another process has made it
    status: int = 1  # of a failed one, alone in its command


class Queue:
    """The cells that wait, in their order. Every rank must call `next`: rank 0 decides for all of them.

    `looked_at`: records that do not count, since they stood there before. Raises UserError where the cache cannot be
    written.
    """

    def __init__(self, todo: Sequence[Cell], results: Path, tally: Tally, looked_at: Collection[Path]) -> None:
        self.total, self.waiting, self.outcomes = len(todo), list(todo), list[Outcome]()
        self.results, self.tally = results, tally
        self._looked_at, self._looked = looked_at, time.monotonic()
        self._folders = {(cell.strategy, cell.seed): folder_of(run_facts(cell.plan)) for cell in todo}
        self._claims = Claims(self._folders.values() if distributed.is_main() else ())

    def next(self) -> Cell | None:
        """The first cell that no other process is at, which no other may begin until `end`; None without one."""
        while True:
            found = distributed.from_main(self._take() if distributed.is_main() else None)
            if found is None:
                return None
            number, path, reason = found
            cell = self.waiting.pop(number)
            if path is None:
                self.tally.begin(cell)
                return cell
            made = record.read(path) if distributed.is_main() else None
            self.end(cell, Outcome(cell=cell, path=path, made=made, reason=reason, ran=False))

    def end(self, cell: Cell, outcome: Outcome) -> None:
        """A cell is over."""
        self.outcomes.append(outcome)
        self.tally.end(cell, "failed" if outcome.reason else "done")
        if distributed.is_main():
            self._claims.release(self._folder(cell))

    def look(self) -> None:
        """For the tally: see who is at the cells that wait, LOOK seconds after the last look at the earliest.

        Raises UserError or OSError where the cache or the results cannot be read.
        """
        if not distributed.is_main() or time.monotonic() - self._looked < LOOK:
            return
        try:
            for cell in self.waiting:
                holder, before = self._claims.seen(self._folder(cell)), self.tally[cell].state
                if holder is None and before == "elsewhere" and self.made_meanwhile(cell):
                    self.tally.end(cell, "done")
                elif before != "done":
                    self.tally.leave(cell, holder)
        finally:
            self._looked = time.monotonic()  # from its end: on a slow file system it takes long

    def made_meanwhile(self, cell: Cell) -> Path | None:
        """The record that another process has made of a cell since this one looked; None without one."""
        return finished_before([cell], self.results, self._looked_at)[0]

    def close(self) -> None:
        """Let go of what is held: what was still at it was interrupted."""
        for entry in self.tally.entries.values():
            if entry.state == "running":
                self.tally.leave(entry.cell, None)
        self._claims.close()

    def _take(self) -> tuple[int, Path | None, str | None] | None:
        """(number among those that wait, its record, why it failed) of a cell that this process holds now."""
        for number, cell in enumerate(self.waiting):
            folder = self._folder(cell)
            if not self._claims.take(folder):
                self.tally.leave(cell, self._claims.seen(folder) or "another process")
                continue
            if path := self.made_meanwhile(cell):
                return number, path, None
            path, failed = newest_of(cell, self.results, self._looked_at, "failed") or (None, None)
            return number, path, failed.reason if failed else None
        return None

    def _folder(self, cell: Cell) -> Path:
        return self._folders[cell.strategy, cell.seed]


def newest_of(cell: Cell, results: Path, known: Collection[Path], status: str) -> tuple[Path, record.Record] | None:
    """The newest record of a cell with that status which is not among the `known` paths; None without one."""
    mine = {
        path: made
        for path, made in read_records(results, known).items()
        if made.status == status and describes(made, cell)
    }
    return max(mine.items(), key=lambda item: item[1].created_at, default=None)


def outcome_of(cell: Cell, results: Path, known: Collection[Path], reason: str | None) -> Outcome:
    """The outcome by the newest record of a cell that was run here; `reason` says why it failed, None for a success."""
    if not distributed.is_main():
        return Outcome(cell=cell, reason=reason)
    found = newest_of(cell, results, known, "failed" if reason else "ok")
    if found is None:
        return Outcome(cell=cell, reason=reason or f"it ended without a record below {results}")
    return Outcome(cell=cell, path=found[0], made=found[1], reason=found[1].reason)
