"""Many runs: those cells of a matrix that have no record yet. A failed run does not stop the others.

    outcomes = run_all(cells, results, reporter, jobs=1, fresh=False, shared=[])

Cells run one after the other in this process, on all its ranks; or `jobs` at once, each in a process of its own
(`run_apart`), on a GPU that no other command uses (`util.gpu_locks`). Either way, the outcome of a run is read from its
record. Several commands may share a matrix, also on several machines: each takes the next cell that no other is at, and
waits for the others' cells last (`run_queue`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from upcycle_bench import record, run_apart
from upcycle_bench.data.batches import Loading
from upcycle_bench.planning.identity import run_facts
from upcycle_bench.planning.matrix import Cell, finished_before, flops_of
from upcycle_bench.planning.plan import check_input, check_strategy, dense_source
from upcycle_bench.planning.tally import Tally, Telling
from upcycle_bench.run import as_begun, run
from upcycle_bench.run_queue import Outcome, Queue, outcome_of
from upcycle_bench.training import session
from upcycle_bench.training.pretrain import load_dense
from upcycle_bench.training.same_view import require_same_view
from upcycle_bench.training.work_folder import folder_of
from upcycle_bench.util import distributed, meter
from upcycle_bench.util.capacity import visible_gpus
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.gpu_locks import GpuLocks
from upcycle_bench.util.log_lines import line_of, progress_in, time_in_words, unstamped
from upcycle_bench.util.progress import Reporter

# Shows the matrix before anything runs: the cells, and for each its record, or None where it is to do.
Show: TypeAlias = Callable[[Sequence[Cell], Sequence[Path | None]], None]
# Shows the matrix in one place while it runs, and gives the reporter that says what does not stand there.
Live: TypeAlias = Callable[[Tally], AbstractContextManager[Reporter]]

AGAIN = 2.0  # seconds until the cells that other processes are at are tried again
WAITING = 600.0  # seconds until a wait for them is said again


def run_all(
    cells: Sequence[Cell],
    results: Path,
    reporter: Reporter,
    *,
    jobs: int,
    fresh: bool,
    shared: Sequence[str],
    track: Sequence[str] = (),
    show: Show = lambda cells, done: None,
    live: Live | None = None,
    loading: Loading | None = None,
) -> list[Outcome]:
    """Run the cells that have no record (with `fresh`: all); returns outcomes in the order of `cells`.

    What another process makes of a cell meanwhile is its outcome, also with `fresh`.
    `shared`: the command-line options with which other processes plan the same runs; `loading`: how batches are read in
    this one. Rank 0 calls `show` before anything runs, or, where something is to do and it is given, `live`. Only its
    outcomes have records. Raises UserError, before anything runs, for bad input.
    """
    plan = cells[0].plan
    check_input(plan, results)
    environment = dict(os.environ)  # for other processes: as it is before the session adds to it
    # One session for all cells: under torchrun a process group cannot be started twice.
    with session.open_session(plan.protocol.threads) as device:
        assert plan.world is not None
        require_same_view(plan.world)
        if not fresh:
            cells = [Cell(plan=as_begun(cell.plan, folder_of(run_facts(cell.plan)))) for cell in cells]
        looked_at = set(results.rglob("*.json"))
        done = _look(cells, results, fresh)
        # A dense model is trained here, once; else each process would train it. Records that name it may be there.
        todo = [cell.plan for cell, path in zip(cells, done, strict=True) if path is None]
        for each in {plan.dense_identity: plan for plan in todo}.values():
            load_dense(each.protocol, plan.world, dense_source(each), device, reporter, loading)
        done = _look(cells, results, fresh)
        todo_cells = [cell for cell, path in zip(cells, done, strict=True) if path is None]
        gpus = GpuLocks(visible_gpus() if device.type == "cuda" and todo_cells else [])
        # This process is bound to its GPU. Where another command has that one, a process of its own takes a free one.
        here = jobs == 1 and (gpus.take_own(device.index or 0) or len(gpus) < 2 or "RANK" in environment)
        queue = Queue(todo_cells, results, Tally(cells, done, flops_of(cells), jobs), looked_at)
        live = live if todo_cells and distributed.is_main() else None
        if live is None and distributed.is_main():
            show(cells, done)
        if here:
            with _showing(queue, live, reporter) as shown, contextlib.closing(gpus):
                run_here(shown, results, fresh, track, loading)
    if not here:
        with _showing(queue, live, reporter) as shown, contextlib.closing(gpus):
            run_in_processes(shown, results, jobs, gpus, shared, environment)
    new = {(outcome.cell.strategy, outcome.cell.seed): outcome for outcome in queue.outcomes}
    return [
        new[cell.strategy, cell.seed]
        if path is None
        else Outcome(cell=cell, path=path, made=record.read(path) if distributed.is_main() else None, ran=False)
        for cell, path in zip(cells, done, strict=True)
    ]


def _look(cells: Sequence[Cell], results: Path, fresh: bool) -> list[Path | None]:
    """For each cell its record. Rank 0 decides for all ranks, which may see different folders: all skip the same."""
    mine = finished_before(cells, results) if distributed.is_main() and not fresh else [None] * len(cells)
    found: list[Path | None] = distributed.from_main(mine)
    return found


@dataclass
class _Shown:
    """A matrix while it runs: in lines, or in a table beside which `reporter` says what does not stand there."""

    queue: Queue
    reporter: Reporter
    in_table: bool
    _waits: float = -WAITING  # when that was last said
    _blind: bool = False  # that has been said

    def look(self) -> None:
        """See what other processes are at. Where that cannot be seen, it is said once: no run may fail for it."""
        try:
            self.queue.look()
        except (UserError, OSError) as error:
            if not self._blind:
                self.reporter.say(f"warning: what other processes run cannot be seen: {error}")
            self._blind = True

    def hear(self, child: run_apart.Child) -> None:
        """Count how far a run in another process is, and say its lines."""
        for line in child.lines():
            progress = progress_in(line)
            if progress and progress[0]:
                self.queue.tally.step(child.cell, *progress)
            if not (progress and self.in_table):
                self.reporter.say(f"{child.cell.strategy} seed {child.cell.seed}: {unstamped(line)}")

    def end(self, outcome: Outcome) -> None:
        """A run is over."""
        self.queue.end(outcome.cell, outcome)
        tally, cell = self.queue.tally, outcome.cell
        if self.in_table and outcome.reason:
            self.reporter.say(f"{cell.strategy} seed {cell.seed} failed: {outcome.reason}")
        elif not self.in_table and self.queue.total > 1:
            counts = {state: str(tally.count(state)) for state in ("failed", "elsewhere") if tally.count(state)}
            left = {} if (seconds := tally.seconds_left()) is None else {"left": time_in_words(seconds)}
            done = {"done": f"{tally.count('done')}/{len(tally.entries)}"}
            self.reporter.say(line_of("runs:", done | counts | left))

    def wait(self) -> None:
        """Other processes are at all cells that wait: try again soon."""
        if not self.in_table and distributed.is_main() and time.monotonic() - self._waits >= WAITING:
            self._waits = time.monotonic()
            others = [self.queue.tally[cell] for cell in self.queue.waiting]
            names = ", ".join(f"{each.cell.strategy} seed {each.cell.seed} ({each.holder})" for each in others)
            self.reporter.say(f"waiting for what others run: {names}")
        time.sleep(AGAIN)


@contextlib.contextmanager
def _showing(queue: Queue, live: Live | None, reporter: Reporter) -> Iterator[_Shown]:
    """Show the queue while it runs; at the end others may have what is left of it."""
    with live(queue.tally) if live else contextlib.nullcontext(reporter) as said, contextlib.closing(queue):
        yield _Shown(queue, said, live is not None)


def run_here(
    shown: _Shown, results: Path, fresh: bool, track: Sequence[str] = (), loading: Loading | None = None
) -> None:
    """Run the cells one after the other in this process; every rank must call it."""
    queue, reporter = shown.queue, shown.reporter
    while queue.waiting:
        if (cell := queue.next()) is None:
            if queue.waiting:
                shown.wait()
            continue
        if not shown.in_table:
            number = queue.total - len(queue.waiting)
            reporter.say(f"run {number} of {queue.total}: {cell.strategy}, seed {cell.seed}")
        known = set(results.rglob("*.json"))
        meter.forget_peak_memory()
        try:
            check_strategy(cell.plan)
        except UserError as error:
            if not shown.in_table:
                reporter.say(f"the run failed: {error}")
            shown.end(Outcome(cell=cell, reason=str(error), status=error.status))
            continue
        before: list[Path] = []  # its record, where a single run has made it meanwhile
        try:
            path = run(
                cell.plan,
                results,
                Telling(queue.tally, cell, reporter, shown.look),
                fresh=fresh,
                track=track,
                loading=loading,
                done=functools.partial(_made_meanwhile, queue, cell, before),
            )
            made = record.read(path) if path is not None else None
            shown.end(Outcome(cell=cell, path=path, made=made, ran=not before))
        except Exception as error:
            if distributed.world_size() > 1:
                # The other ranks may wait for this one in a collective, until its process ends.
                reporter.say(f"a failure on several ranks ends the matrix; others run without {cell.strategy}")
                raise
            status = error.status if isinstance(error, UserError) else 1
            failed = outcome_of(cell, results, known, f"{type(error).__name__}: {error}")
            shown.end(replace(failed, status=status))


def _made_meanwhile(queue: Queue, cell: Cell, found: list[Path]) -> Path | None:
    """The record of a cell that is new since the queue was made, which is also added to `found`; None without one."""
    path = queue.made_meanwhile(cell)
    found += [path] if path else []
    return path


def run_in_processes(
    shown: _Shown, results: Path, jobs: int, gpus: GpuLocks, shared: Sequence[str], environment: Mapping[str, str]
) -> None:
    """Run `jobs` cells at once, each in a process and on a GPU of its own; an interruption stops all of them."""
    queue, children, again = shown.queue, list[run_apart.Child](), 0.0
    try:
        while queue.waiting or children:
            while queue.waiting and len(children) < jobs and time.monotonic() >= again:
                if (cell := queue.next()) is None:
                    again = time.monotonic() + AGAIN
                    break
                place = min(set(range(jobs)) - {child.place for child in children})
                children.append(run_apart.start(cell, place, results, shared, environment, gpus.take(place)))
            if children:
                time.sleep(run_apart.POLL)
            elif queue.waiting:
                shown.wait()
            for child in list(children):
                over = child.process.poll() is not None
                shown.hear(child)
                if over:
                    children.remove(child)
                    child.output.close()
                    gpus.release(child.place)
                    shown.end(outcome_of(child.cell, results, child.known, child.why()))
            shown.look()
    finally:
        run_apart.stop(children, shown.hear)
