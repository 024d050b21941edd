"""Many runs: those cells of a matrix that have no record yet. A failed run does not stop the others.

    outcomes = run_all(cells, results, reporter, jobs=1, fresh=False, shared=[])

Cells run one after the other in this process, on all its ranks; or `jobs` at once, each in a process of its own. Either
way, the outcome of a run is read from its record.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from upcycle_bench import record
from upcycle_bench.data.batches import Loading
from upcycle_bench.planning.identity import run_facts
from upcycle_bench.planning.matrix import Cell, describes, finished_before, read_records
from upcycle_bench.planning.plan import check_input, check_strategy, dense_source
from upcycle_bench.run import as_begun, run
from upcycle_bench.training import session
from upcycle_bench.training.pretrain import load_dense
from upcycle_bench.training.same_view import require_same_view
from upcycle_bench.training.work_folder import folder_of
from upcycle_bench.util import distributed, meter
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.log_lines import unstamped
from upcycle_bench.util.progress import Reporter

# Shows the matrix before anything runs: the cells, and for each its record, or None where it is to do.
Show = Callable[[Sequence[Cell], Sequence[Path | None]], None]

# Not `-m upcycle_bench`: that imports from the working folder first, which may be a clone that was not installed.
START = (
    "import sys; sys.path[:] = filter(None, sys.path); sys.argv[0] = 'upcycle-bench'; "
    "from upcycle_bench.cli import main; main()"
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a cell. A failed one has a reason, and a record unless it failed before anything ran."""

    cell: Cell
    path: Path | None = None
    made: record.Record | None = None
    reason: str | None = None
    ran: bool = True  # False: its record was there before
    status: int = 1  # of a failed one, alone in its command


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
    loading: Loading | None = None,
) -> list[Outcome]:
    """Run the cells that have no record (with `fresh`: all); returns outcomes in the order of `cells`.

    `shared`: the command-line options with which other processes plan the same runs; `loading`: how batches are read in
    this one. Rank 0 calls `show` before
    anything runs; only its outcomes have records. Raises UserError, before anything runs, for bad input.
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
        done = _look(cells, results, fresh)
        # A dense model is trained here, once; else each process would train it. Records that name it may be there.
        todo = [cell.plan for cell, path in zip(cells, done, strict=True) if path is None]
        for each in {plan.dense_identity: plan for plan in todo}.values():
            load_dense(each.protocol, plan.world, dense_source(each), device, reporter, loading)
        looked_at = set(results.rglob("*.json"))
        done = _look(cells, results, fresh)
        todo_cells = [cell for cell, path in zip(cells, done, strict=True) if path is None]
        if distributed.is_main():
            show(cells, done)
        if jobs == 1:
            made = run_here(todo_cells, results, reporter, fresh, track, loading, looked_at)
    if jobs > 1:
        made = run_apart(todo_cells, results, reporter, jobs, shared, environment)
    new = {(outcome.cell.strategy, outcome.cell.seed): outcome for outcome in made}
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


def run_here(
    todo: Sequence[Cell],
    results: Path,
    reporter: Reporter,
    fresh: bool,
    track: Sequence[str] = (),
    loading: Loading | None = None,
    looked_at: Collection[Path] = (),
) -> list[Outcome]:
    """Run the cells one after the other in this process; every rank must call it.

    `looked_at`: records that are known not to be of these cells.
    """
    outcomes = []
    for number, cell in enumerate(todo, start=1):
        reporter.say(f"run {number} of {len(todo)}: {cell.strategy}, seed {cell.seed}")
        known = set(results.rglob("*.json"))
        meter.forget_peak_memory()
        try:
            check_strategy(cell.plan)
        except UserError as error:
            reporter.say(f"the run failed: {error}")
            outcomes.append(Outcome(cell=cell, reason=str(error), status=error.status))
            continue
        before: list[Path] = []  # its record, where another process has made it meanwhile
        try:
            path = run(
                cell.plan,
                results,
                reporter,
                fresh=fresh,
                track=track,
                loading=loading,
                done=(lambda: None) if fresh else functools.partial(_made_meanwhile, cell, results, looked_at, before),
            )
            made = record.read(path) if path is not None else None
            outcomes.append(Outcome(cell=cell, path=path, made=made, ran=not before))
        except Exception as error:
            if distributed.world_size() > 1:
                # The other ranks may wait for this one in a collective, until its process ends.
                reporter.say(f"a failure on several ranks ends the matrix; others run without {cell.strategy}")
                raise
            status = error.status if isinstance(error, UserError) else 1
            failed = _outcome(cell, results, known, f"{type(error).__name__}: {error}")
            outcomes.append(replace(failed, status=status))
    return outcomes


def _made_meanwhile(cell: Cell, results: Path, known: Collection[Path], found: list[Path]) -> Path | None:
    """The record of a cell that is not among the `known` ones, which is also added to `found`; None without one."""
    (path,) = finished_before([cell], results, known)
    found += [path] if path else []
    return path


def _outcome(cell: Cell, results: Path, known: Collection[Path], reason: str | None) -> Outcome:
    """The outcome by the newest record of this cell that is not among the `known` paths.

    `reason` says why the run failed; None for a success.
    """
    if not distributed.is_main():
        return Outcome(cell=cell, reason=reason)
    status = "failed" if reason else "ok"
    mine = {
        path: made
        for path, made in read_records(results, known).items()
        if made.status == status and describes(made, cell)
    }
    path, made = max(mine.items(), key=lambda item: item[1].created_at, default=(None, None))
    if made is None:
        return Outcome(cell=cell, reason=reason or f"it ended without a record below {results}")
    return Outcome(cell=cell, path=path, made=made, reason=made.reason)


@dataclass
class _Child:
    """A run in a process of its own."""

    cell: Cell
    process: subprocess.Popen[bytes]
    known: set[Path]

    def forward(self, say: Callable[[str], None]) -> str | None:
        """Say each line of its stderr until it ends; returns why it failed, or None."""
        last = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if text := line.decode(errors="replace").rstrip():
                say(f"{self.cell.strategy} seed {self.cell.seed}: {unstamped(text)}")
                last = text
        return _why(self.process.wait(), last)


def _why(code: int, last: str) -> str | None:
    """Why a process with that exit status failed, or None; `last`: the last line of its stderr."""
    if code < 0:
        names = {each.value: each.name for each in signal.Signals}
        memory = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        return f"killed by {names.get(-code, f'signal {-code}')}{memory}"
    return (last.removeprefix("error: ") or f"exit status {code}") if code else None


def run_apart(
    todo: Sequence[Cell],
    results: Path,
    reporter: Reporter,
    jobs: int,
    shared: Sequence[str],
    environment: Mapping[str, str],
) -> list[Outcome]:
    """Run `jobs` cells at once, each in a process whose stderr a thread reads; an interruption stops all processes."""
    waiting = deque(todo)
    started: list[_Child] = []
    children: dict[Future[str | None], _Child] = {}
    outcomes = []
    with ThreadPoolExecutor(jobs) as threads:
        try:
            for _ in reporter.track(range(len(todo)), "runs"):
                while waiting and len(children) < jobs:
                    started.append(_start(waiting.popleft(), results, shared, environment))
                    children[threads.submit(started[-1].forward, reporter.say)] = started[-1]
                over = next(iter(wait(children, return_when=FIRST_COMPLETED).done))
                reason, child = over.result(), children.pop(over)
                outcomes.append(_outcome(child.cell, results, child.known, reason))
        finally:
            _stop([child.process for child in started if child.process.poll() is None])
    return outcomes


def _start(cell: Cell, results: Path, shared: Sequence[str], environment: Mapping[str, str]) -> _Child:
    """Start a process that runs this cell: the same command for one strategy and one pair of seeds.

    A tuned row is run by `tune`, which finds its candidates done and chooses the same one.
    """
    plan = cell.plan
    seeds = ["--init-seed", str(plan.init_seed), "--train-seed", str(plan.train_seed)]
    options = [] if plan.tuned else [part for key, value in plan.options.items() for part in ("-o", f"{key}={value}")]
    own = ["tune" if plan.tuned else "run", "--strategy", plan.entry.name, *options, *seeds]
    command = [sys.executable, "-c", START, *own, *shared]
    known = set(results.rglob("*.json"))
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # else a terminal's Ctrl-C reaches it too, and a second one stops its clean-up
    )
    return _Child(cell, process, known)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the processes by SIGTERM, after which a run writes a checkpoint; a second signal here kills them.

    SIGINT would not do: processes of a background shell ignore it.
    """
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()  # its thread reads its stderr meanwhile
    except (KeyboardInterrupt, SystemExit):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a session of its own: its workers hold stderr, too
            process.wait()
        raise
