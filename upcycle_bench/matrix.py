"""The matrix: several strategies by several seeds under one protocol; what is missing of it is run.

    cells = list(enumerate_cells(plans, seed_pairs(seed=0, count=3)))          # pure: a cell is a plan
    done = [finished(cell, run_id(cell.plan, dense), records) for cell in cells]
    outcomes = run_all(cells, results, reporter, jobs=1, fresh=False, shared=[])

Cells run one after the other in this process (on all its ranks), or `jobs` at once in processes of their own. What
became of a run is read from its record, wherever it ran. Tables of it are display.py's.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from upcycle_bench import costs, display, distributed, engine, record
from upcycle_bench.cache import file_sha256
from upcycle_bench.errors import UserError
from upcycle_bench.planning.plan import Plan, check_input, check_strategy, dense_path, run_id
from upcycle_bench.pretrain import load_dense
from upcycle_bench.progress import Reporter
from upcycle_bench.registry import Registry
from upcycle_bench.run import run

Seeds = tuple[int, int]  # initialisation, training
Records = Mapping[Path, record.Record]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the matrix."""

    plan: Plan

    @property
    def strategy(self) -> str:
        """The row."""
        return self.plan.label

    @property
    def seed(self) -> str:
        """The column: `0`, or `0/1` where initialisation and training have seeds of their own."""
        init, train = self.plan.init_seed, self.plan.train_seed
        return str(init) if init == train else f"{init}/{train}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a cell. A failed one has a reason, and a record unless it failed before anything ran."""

    cell: Cell
    path: Path | None = None
    made: record.Record | None = None
    reason: str | None = None
    ran: bool = True  # False: it was done before


def strategy_names(registry: Registry, text: str) -> list[str]:
    """`a,b,c`, or `all`: every registered strategy, controls first. UserError for a name unknown or given twice."""
    if text == "all":
        strategies = registry.strategies
        return sorted(strategies, key=lambda name: (strategies[name].target.info.status != "control", name))
    names = [name.strip() for name in text.split(",")]
    if "all" in names:
        raise UserError(f"--strategy {text}: 'all' stands alone; it names every strategy.")
    for name in names:
        registry.get("strategy", name)
        if names.count(name) > 1:
            raise UserError(f"--strategy names {name} twice; every strategy is one row.")
    return names


def seed_pairs(seed: int, count: int, init_seed: int | None = None, train_seed: int | None = None) -> list[Seeds]:
    """`count` seeds from `seed` on, for both purposes; one that is given stays fixed."""
    if count > 1 and init_seed is not None and train_seed is not None:
        raise UserError(f"--seeds {count} leaves nothing to vary; give --init-seed or --train-seed, not both.")
    return [
        (number if init_seed is None else init_seed, number if train_seed is None else train_seed)
        for number in range(seed, seed + count)
    ]


def enumerate_cells(plans: Sequence[Plan], seeds: Iterable[Seeds]) -> Iterator[Cell]:
    """Seed by seed: however early a matrix is stopped, its finished seeds compare all strategies."""
    for init, train in seeds:
        for plan in plans:
            yield Cell(plan=replace(plan, init_seed=init, train_seed=train))


def finished(cell: Cell, run_id: str, records: Records) -> Path | None:
    """The newest record that this cell would make again; by content, since anyone may rename a file."""
    fitting = [
        (made.created_at, path)
        for path, made in records.items()
        if made.status == "ok" and made.run_id == run_id and _describes(made, cell) and _complete(made, cell)
    ]
    return max(fitting)[1] if fitting else None


def _describes(made: record.Record, cell: Cell) -> bool:
    """Whether a record, of a success or a failure, is of this cell."""
    plan, protocol = cell.plan, made.protocol
    return (
        made.strategy.label == plan.label
        and (protocol.name, protocol.division) == (plan.protocol.name, plan.division)
        and protocol.training_fingerprint == plan.training_fingerprint
        and protocol.suite_fingerprints.items() <= plan.suite_fingerprints.items()
        and plan.suite_fingerprints.keys() - protocol.suite_fingerprints.keys() <= made.skipped.keys()
        and (made.seeds.init, made.seeds.train) == (plan.init_seed, plan.train_seed)
    )


def _complete(made: record.Record, cell: Cell) -> bool:
    """Whether no suite that this cell wants was skipped."""
    return made.protocol.suite_fingerprints == cell.plan.suite_fingerprints


def read_records(results: Path, known: Collection[Path] = ()) -> dict[Path, record.Record]:
    """The records below `results` but for the `known` ones. A file that is none does not count as a run."""
    found = {}
    for path in sorted(set(results.rglob("*.json")) - set(known)):
        with contextlib.suppress(UserError):
            found[path] = record.read(path)
    return found


def finished_before(cells: Sequence[Cell], results: Path, dense_digest: str) -> list[Path | None]:
    """For each cell the record that makes it done, or None."""
    records = read_records(results)
    return [finished(cell, run_id(cell.plan, dense_digest), records) for cell in cells]


def preview(cells: Sequence[Cell], results: Path, fresh: bool) -> list[Path | None]:
    """`finished_before` for a dry run: without the dense model there is nothing to go by, and none is made."""
    plan = cells[0].plan
    path = dense_path(plan)
    if fresh or plan.missing or not path.is_file():
        return [None] * len(cells)
    return finished_before(cells, results, file_sha256(path))


def estimate(cells: Sequence[Cell]) -> tuple[int, float]:
    """FLOPs of preparation (at most) and training without what losses of strategies add; seconds on one such device."""
    if not cells:
        return 0, 0.0
    protocol = cells[0].plan.protocol
    strategies = {cell.plan.label: cell.plan.strategy for cell in cells}
    estimates = {label: costs.estimate(protocol, strategy) for label, strategy in strategies.items()}
    each = {label: made.prepare_flops_at_most + made.train_flops for label, made in estimates.items()}
    flops = sum(each[cell.plan.label] for cell in cells)
    return flops, costs.estimate_seconds(protocol, flops, engine.choose_device()) if flops else 0.0


def run_all(
    cells: Sequence[Cell], results: Path, reporter: Reporter, *, jobs: int, fresh: bool, shared: Sequence[str]
) -> list[Outcome]:
    """Run what is missing, past failures; outcomes in the order of `cells`, without records on ranks other than 0.

    `shared` are the options that processes of their own need to plan the same runs. UserError before anything runs.
    """
    plan = cells[0].plan
    check_input(plan, results)
    environment = dict(os.environ)  # before the session adds to it
    # One session for all cells: under torchrun a process group cannot be made a second time.
    with engine.session(plan.protocol.threads) as device:
        assert plan.world is not None
        dense_digest = load_dense(plan.protocol, plan.world, dense_path(plan), device, reporter)[
            1
        ]  # once, or children would each train it
        # Rank 0's view: a rank that saw another folder would wait in a run that the others skip.
        view = finished_before(cells, results, dense_digest) if distributed.is_main() and not fresh else None
        done = distributed.from_main(view or [None] * len(cells))
        todo = [cell for cell, path in zip(cells, done, strict=True) if path is None]
        if distributed.is_main():
            display.show_matrix(cells, done)
        if jobs == 1:
            made = run_here(todo, results, reporter, fresh)
    if jobs > 1:
        made = run_apart(todo, results, jobs, shared, environment)
    new = {(outcome.cell.strategy, outcome.cell.seed): outcome for outcome in made}
    return [
        new[cell.strategy, cell.seed]
        if path is None
        else Outcome(cell=cell, path=path, made=record.read(path) if distributed.is_main() else None, ran=False)
        for cell, path in zip(cells, done, strict=True)
    ]


def run_here(todo: Sequence[Cell], results: Path, reporter: Reporter, fresh: bool) -> list[Outcome]:
    """One after the other in this process; all ranks take part."""
    outcomes = []
    for number, cell in enumerate(todo, start=1):
        say = print if distributed.is_main() else _silent
        say(f"run {number} of {len(todo)}: {cell.strategy}, seed {cell.seed}", file=sys.stderr)
        known = set(results.rglob("*.json"))
        costs.forget_peak_memory()
        try:
            check_strategy(cell.plan)
        except UserError as error:
            say(f"the run failed: {error}", file=sys.stderr)
            outcomes.append(Outcome(cell=cell, reason=str(error)))
            continue
        try:
            run(cell.plan, results, reporter, fresh=fresh)
            reason = None
        except Exception as error:
            if distributed.world_size() > 1:
                # The others may wait in a collective for this rank; only its end frees them.
                say(f"a failure on several ranks ends the matrix; others run without {cell.strategy}", file=sys.stderr)
                raise
            reason = f"{type(error).__name__}: {error}"
        outcomes.append(_outcome(cell, results, known, reason))
    return outcomes


def _silent(*_: object, **__: object) -> None:
    pass


def _outcome(cell: Cell, results: Path, known: Collection[Path], reason: str | None) -> Outcome:
    """What the record says that was written since `known`; `reason`: why it failed, if it did."""
    if not distributed.is_main():
        return Outcome(cell=cell, reason=reason)
    status = "failed" if reason else "ok"
    mine = {
        path: made
        for path, made in read_records(results, known).items()
        if made.status == status and _describes(made, cell)
    }
    path, made = max(mine.items(), key=lambda item: item[1].created_at, default=(None, None))
    assert made is not None or reason, f"{cell.strategy}: no record"
    return Outcome(cell=cell, path=path, made=made, reason=made.reason if made else reason)


@dataclass
class _Child:
    """A run in a process of its own; what it says on stderr is forwarded line by line."""

    cell: Cell
    process: subprocess.Popen[bytes]
    known: set[Path]
    rest: bytes = b""
    last: str = ""

    @property
    def pipe(self) -> int:
        assert self.process.stderr is not None
        return self.process.stderr.fileno()

    def lines(self) -> list[str] | None:
        """The whole lines that arrived, prefixed; None when it has closed the pipe."""
        piece = os.read(self.pipe, 1 << 16)
        *whole, self.rest = (self.rest + (piece or b"\n")).split(b"\n")
        texts = [text for line in whole if (text := line.decode(errors="replace").rstrip())]
        self.last = texts[-1] if texts else self.last
        if not piece and not texts:
            return None
        return [f"{self.cell.strategy} seed {self.cell.seed}: {text}" for text in texts]


# Not `-m upcycle_bench`: that looks into the working folder first, where a clone may have the sources without plugins.
START = (
    "import sys; sys.path[:] = filter(None, sys.path); sys.argv[0] = 'upcycle-bench'; "
    "from upcycle_bench.cli import main; main()"
)


def run_apart(
    todo: Sequence[Cell], results: Path, jobs: int, shared: Sequence[str], environment: dict[str, str]
) -> list[Outcome]:
    """`jobs` at once, each in a process of its own with its share of the cores; an interruption stops them all."""
    waiting = deque(todo)
    children: list[_Child] = []
    outcomes = []
    with display.runs_bar(len(todo)) as bar, selectors.DefaultSelector() as selector:
        try:
            while waiting or children:
                while waiting and len(children) < jobs:
                    children.append(_start(waiting.popleft(), results, shared, environment))
                    selector.register(children[-1].pipe, selectors.EVENT_READ, children[-1])
                for key, _ in selector.select():
                    child: _Child = key.data
                    lines = child.lines()
                    if lines is not None:
                        for line in lines:
                            bar.say(line)
                        continue
                    selector.unregister(child.pipe)
                    code = child.process.wait()
                    children.remove(child)
                    reason = (child.last.removeprefix("error: ") or f"exit status {code}") if code else None
                    outcomes.append(_outcome(child.cell, results, child.known, reason))
                    bar.advance()
        finally:
            _stop([child.process for child in children])
    return outcomes


def _start(cell: Cell, results: Path, shared: Sequence[str], environment: Mapping[str, str]) -> _Child:
    seeds = ["--init-seed", str(cell.plan.init_seed), "--train-seed", str(cell.plan.train_seed)]
    command = [sys.executable, "-c", START, "run", "--strategy", cell.plan.entry.name, *seeds, *shared]
    known = set(results.rglob("*.json"))
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # a terminal's Ctrl-C would reach it too, and a second one would stop its tidying up
    )
    return _Child(cell, process, known)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, which a run takes as a Ctrl-C (SIGINT is ignored below a background shell); a second Ctrl-C kills."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.communicate()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
            process.wait()
        raise
