"""Jobs on this machine as a cluster's scheduler runs them: each in processes of its own, with a log, and again on 75.

    queue = LocalJobs({1: "upcycle-bench run --strategy dense", 2: "..."}, Path("logs"), processes=2, say=print)
    statuses = queue.run()                          # {1: 0, 2: 1}; no status for a job that was not started
    queue.stopped                                   # the signal that ended it early, or None

Ctrl-C, SIGTERM and SIGUSR1 are passed on to the processes of all jobs, which have time to write a checkpoint. No job is
started after that. A second Ctrl-C kills them.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

UNFINISHED = 75  # of a command that goes on when it is given again: EX_TEMPFAIL of sysexits.h
APART = 60  # seconds in which all processes of a job end, once the first one has
POLL = 0.1  # seconds


@dataclass
class Job:
    """One start of a job."""

    number: int
    place: int  # among those at once
    processes: Sequence[subprocess.Popen[bytes]]
    first_end: float | None = None

    def status(self) -> int | None:
        """The exit status of all processes, or None while one lives; those that outlive another for long are killed.

        75 where the others have 0; else that of the lowest rank with another one.
        """
        codes = [process.poll() for process in self.processes]
        if None not in codes:
            failed = [code for code in codes if code not in (0, UNFINISHED)]
            return failed[0] if failed else max(code or 0 for code in codes)
        if any(code is not None for code in codes):
            self.first_end = self.first_end or time.monotonic()
            if time.monotonic() - self.first_end > APART:
                self.signal(signal.SIGKILL)
        return None

    def signal(self, number: int) -> None:
        """Send a signal to those processes that live."""
        for process in self.processes:
            process.send_signal(number)


@dataclass
class LocalJobs:
    """A queue of command lines, by their numbers; `at_once` of them run, `processes` for each line.

    With `gpus` each of those at once sees as many GPUs of its own. `say` is told what starts and ends.
    """

    lines: Mapping[int, str]
    logs: Path
    processes: int = 1
    at_once: int = 1
    gpus: int = 0
    requeue_limit: int = 20
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    say: Callable[[str], None] = lambda line: None
    stopped: int | None = None
    _running: list[Job] = field(default_factory=list)

    def run(self) -> dict[int, int]:
        """Run all lines; returns the exit status of each that was started, negative for a signal."""
        waiting = deque(self.lines)
        starts: Counter[int] = Counter()
        statuses: dict[int, int] = {}
        with self._signals():
            while self._running or (waiting and not self.stopped):
                while waiting and len(self._running) < self.at_once and not self.stopped:
                    starts[waiting[0]] += 1
                    self._running.append(self._start(waiting.popleft()))
                    if self.stopped:  # the signal came before the job was there to be told
                        self._tell(self.stopped)
                time.sleep(POLL)
                for job in list(self._running):
                    if (status := job.status()) is None:
                        continue
                    self._running.remove(job)
                    statuses[job.number] = status
                    self.say(f"job {job.number} ended with status {status}")
                    if status == UNFINISHED and starts[job.number] <= self.requeue_limit:
                        waiting.append(job.number)
        return statuses

    def _start(self, number: int) -> Job:
        """Start the processes of a line; their output goes to the end of its log."""
        line, log = self.lines[number], self.logs / f"{number}.log"
        place = next(place for place in range(self.at_once) if place not in {job.place for job in self._running})
        self.say(f"job {number} starts: {line} (log: {log})")
        with log.open("ab") as file:
            file.write(f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ} starts: {line}\n".encode())
            file.flush()
            port = _free_port()
            started = [
                subprocess.Popen(
                    shlex.split(line),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**self.environment, **self._ranks(rank, port), **self._visible(place)},
                    start_new_session=True,  # else a terminal's Ctrl-C would reach it, too
                )
                for rank in range(self.processes)
            ]
        return Job(number, place, started)

    def _ranks(self, rank: int, port: int) -> dict[str, str]:
        """torchrun's variables. torchrun itself would turn each exit status into 1."""
        if self.processes == 1:
            return {}
        world = str(self.processes)
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def _visible(self, place: int) -> dict[str, str]:
        """The GPUs of the job at that place."""
        if not self.gpus:
            return {}
        every = self.environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.at_once * self.gpus)))
        return {"CUDA_VISIBLE_DEVICES": ",".join(every.split(",")[place * self.gpus :][: self.gpus])}

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Within the block signals are passed on; no process outlives it."""
        every = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, self._pass_on) for number in every}
        try:
            yield
        finally:
            for job in self._running:
                job.signal(signal.SIGKILL)
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _pass_on(self, number: int, _: Any) -> None:
        again = number == self.stopped == signal.SIGINT
        self.stopped = number
        self._tell(signal.SIGKILL if again else number)

    def _tell(self, number: int) -> None:
        for job in self._running:  # SIGINT would not do: processes of a background shell ignore it
            job.signal(signal.SIGTERM if number == signal.SIGINT else number)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
