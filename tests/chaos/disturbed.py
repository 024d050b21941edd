"""A run of the command line in processes of its own, which a fault can reach in a known phase.

with Attempt(command(ranks=2), cache, results) as attempt:
    attempt.reached("train")                # waits until the run is there
    os.kill(attempt.rank(1), signal.SIGKILL)
    status = attempt.status()
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


def command(ranks: int = 1, ep_size: int = 1, strategy: str = "cluster-aware", more: Sequence[str] = ()) -> list[str]:
    """The command of a run on that many processes."""
    settings = [*SHORT, f"moe.ep_size={ep_size}"]
    words = ["run", "--strategy", strategy, "--protocol", "smoke"]
    words += [word for setting in settings for word in ("--set", setting)] + list(more)
    if ranks == 1:
        return [sys.executable, "-m", "upcycle_bench", *words]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *launcher, "-m", "upcycle_bench", *words]


class Attempt:
    """A started command; at the end of the block nothing of it is left. `lines` grows as it writes to stderr."""

    def __init__(self, words: Sequence[str], cache: Path, results: Path) -> None:
        self.lines: list[str] = []
        self._news = threading.Condition()
        environment = dict(os.environ) | {"UPCYCLE_BENCH_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*words, "--results", str(results)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
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
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the run did not come to {phase}: {self.lines[-3:]}")
            with self._news:
                self._news.wait(0.05)

    def status(self) -> int:
        """The exit status, when the command is over."""
        status = self.process.wait(PATIENCE)
        self._reader.join(5)  # a process that was left behind would hold the pipe
        return status

    def signal(self, number: int) -> None:
        """Send a signal to all processes, as a scheduler does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def signal_ranks(self, number: int) -> None:
        """Send a signal to the ranks and not to their launcher, as Slurm does to the tasks of a step."""
        for pid in self._ranks().values():
            os.kill(pid, number)

    def rank(self, number: int) -> int:
        """The process of that rank."""
        return self._ranks()[number]

    def _ranks(self) -> dict[int, int]:
        """Rank -> process, of the processes of this session whose parent is the launcher; without one, the command."""
        found: dict[int, int] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                names = dict(
                    part.partition("=")[::2] for part in (folder / "environ").read_bytes().decode().split("\0") if part
                )
                if parent == self.process.pid and "RANK" in names:
                    found[int(names["RANK"])] = int(folder.name)
        return found or {0: self.process.pid}
