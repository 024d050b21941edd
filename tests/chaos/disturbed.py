"""A run of the command line in processes of its own, which a fault can reach in a known phase.

with Attempt(command(), cache, results, ranks=2) as attempt:
    attempt.reached("train")                # waits until the run is there
    attempt.processes[1].kill()
    statuses = attempt.statuses()
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests.ranks import variables

PATIENCE = 600.0  # seconds that any wait may take on a slow machine

# A run that takes seconds, and has all phases: it trains its dense model, calibrates, has a teacher, and evaluates.
SHORT = (
    "dense.schedule.steps=60",
    "train.schedule.steps=60",
    "train.checkpoint_every=8",
    "train.log_every=2",
)

# The line of stderr after which a run without a terminal is in that phase.
PHASES = {
    "dense": re.compile(r"dense model: step=\d"),
    "making": re.compile("start initialising"),
    "train": re.compile(r"training \S+: step=(1[7-9]|2\d)/"),  # behind two checkpoints
    "evaluate": re.compile("start evaluating"),
}


def command(ep_size: int = 1, strategy: str = "cluster-aware", torchrun: int = 0) -> list[str]:
    """The command of one rank of a run, or that of torchrun for so many ranks."""
    settings = [*SHORT, f"moe.ep_size={ep_size}"]
    words = ["-m", "upcycle_bench", "run", "--strategy", strategy, "--protocol", "smoke"]
    words += [word for setting in settings for word in ("--set", setting)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"] if torchrun else []
    return [sys.executable, *launcher, *words]


class Attempt:
    """A command that was started, `ranks` times; at the end of the block nothing of it is left.

    `lines` grows as the ranks write to stderr.
    """

    def __init__(self, words: Sequence[str], cache: Path, results: Path, ranks: int = 1) -> None:
        self.lines: list[str] = []
        self._news = threading.Condition()
        self.processes = [
            subprocess.Popen(
                [*words, "--results", str(results)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**os.environ, "UPCYCLE_BENCH_CACHE": str(cache), "OMP_NUM_THREADS": "1", **own},
                start_new_session=True,
            )
            for own in variables(ranks)
        ]
        self._readers = [threading.Thread(target=self._read, args=(each,), daemon=True) for each in self.processes]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()

    def reached(self, phase: str) -> None:
        """Wait until the run is in that phase; RuntimeError where it ended before."""
        pattern, end = PHASES[phase], time.monotonic() + PATIENCE
        seen = 0
        while True:
            with self._news:
                new, seen = self.lines[seen:], len(self.lines)
            if any(pattern.search(line) for line in new):
                return
            if self.processes[0].poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the run did not come to {phase}: {self.lines[-3:]}")
            with self._news:
                self._news.wait(0.05)

    def statuses(self) -> list[int]:
        """The exit status of each rank, when all are over; under torchrun its own."""
        end = time.monotonic() + PATIENCE
        found = [process.wait(max(1.0, end - time.monotonic())) for process in self.processes]
        for reader in self._readers:
            reader.join(5)  # a process that was left behind would hold the pipe
        return found

    def signal(self, number: int) -> None:
        """Send a signal to all processes, as a scheduler does."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def signal_ranks(self, number: int) -> None:
        """Send a signal to the ranks alone, as Slurm does to the tasks of a step."""
        for process in self.processes:
            process.send_signal(number)
