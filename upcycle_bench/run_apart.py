"""Runs in processes of their own: the same command for one strategy and one pair of seeds.

    child = start(cell, place, results, shared, environment, gpu)
    for line in child.lines(): ...          # what it has written on stderr since the last call
    child.process.poll()                    # None while it runs; then child.why() is None, or says why it failed
    stop([child], hear)

A child writes into a file without a name, not into a pipe: its parent need not read it at once, and may be killed. A
child whose parent was killed stops as on SIGTERM, with a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from upcycle_bench.planning.matrix import Cell
from upcycle_bench.util.log_lines import unstamped

POLL = 0.1  # seconds

# Not `-m upcycle_bench`: that imports from the working folder first, which may be a clone that was not installed.
START = (
    "import sys; sys.path[:] = filter(None, sys.path); sys.argv[0] = 'upcycle-bench'; "
    "from upcycle_bench.run_apart import stop_with; stop_with({parent}); "
    "from upcycle_bench.cli import main; main()"
)


def stop_with(parent: int) -> None:
    """Stop this process as on SIGTERM once `parent` is no longer its parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@dataclass
class Child:
    """A run in a process of its own. `place` is its number among those at once, `known` are the records before it."""

    cell: Cell
    place: int
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    known: set[Path]
    last: str = ""  # line on stderr
    _read: int = 0
    _rest: bytes = b""

    def lines(self) -> Iterator[str]:
        """The lines of its stderr that are new, empty ones left out; at its end the last one, too."""
        over = self.process.poll() is not None
        # Not `read`: it would move the place at which the child writes.
        while new := os.pread(self.output.fileno(), 1 << 20, self._read):
            self._read += len(new)
            *whole, self._rest = (self._rest + new).split(b"\n")
            yield from filter(None, map(self._text, whole))
        if over and (text := self._text(self._rest)):
            self._rest = b""
            yield text

    def _text(self, line: bytes) -> str:
        text = line.decode(errors="replace").rstrip()
        self.last = text or self.last
        return text

    def why(self) -> str | None:
        """Why it failed, once it has ended and its lines are read; None where it did not."""
        code = self.process.returncode
        if code < 0:
            names = {each.value: each.name for each in signal.Signals}
            memory = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
            return f"killed by {names.get(-code, f'signal {-code}')}{memory}"
        return (unstamped(self.last).removeprefix("error: ") or f"exit status {code}") if code else None


def start(
    cell: Cell, place: int, results: Path, shared: Sequence[str], environment: Mapping[str, str], gpu: str | None = None
) -> Child:
    """Start a process that runs this cell; where `gpu` names one, on that.

    A tuned row is run by `tune`, which finds its candidates done and chooses the same one.
    """
    plan = cell.plan
    seeds = ["--init-seed", str(plan.init_seed), "--train-seed", str(plan.train_seed)]
    options = [] if plan.tuned else [part for key, value in plan.options.items() for part in ("-o", f"{key}={value}")]
    own = ["tune" if plan.tuned else "run", "--strategy", plan.entry.name, *options, *seeds]
    command = [sys.executable, "-c", START.format(parent=os.getpid()), *own, *shared]
    known, output = set(results.rglob("*.json")), tempfile.TemporaryFile()  # noqa: SIM115 (the child's, while it lives)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=output,
        env={**environment, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})},
        start_new_session=True,  # else a terminal's Ctrl-C reaches it too, and a second one stops its clean-up
    )
    return Child(cell, place, process, output, known)


def stop(children: Sequence[Child], hear: Callable[[Child], None]) -> None:
    """End the processes by SIGTERM, after which a run writes a checkpoint; a second signal here kills them.

    `hear` is told meanwhile that a child may have written. SIGINT would not do: processes of a background shell ignore
    it.
    """
    living = [child for child in children if child.process.poll() is None]
    for child in living:
        child.process.terminate()
    try:
        while living:
            living = [child for child in living if child.process.poll() is None]
            for child in children:
                hear(child)
            time.sleep(POLL)
    except (KeyboardInterrupt, SystemExit):
        for child in living:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)  # a session of its own: with its workers
            child.process.wait()
        raise
