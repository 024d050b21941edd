"""What this process was asked by SIGTERM, SIGUSR1 or `--stop-after`, and `Stopped`, by which it ends. Imports little.

    request.by                      # "SIGTERM", or None
    pass_on("SIGTERM")              # another rank got it: as if this process had got it, too

`training.stopping` handles the signals; `util.first_cause` tells the other ranks.
"""

from __future__ import annotations

import signal
import threading

STATUS = 75  # EX_TEMPFAIL of sysexits.h: not finished; type the same command again
SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1", signal.SIGALRM: "--stop-after"}


class Stopped(SystemExit):
    """The command was asked to end, and the same command goes on. No error: no failed record is written.

    `step`: after which all ranks have agreed to; 0 where this process ends without asking the others.
    """

    def __init__(self, by: str, step: int = 0) -> None:
        super().__init__(STATUS)
        self.by, self.step = by, step


class Request:
    """What was asked of this process so far."""

    by: str | None = None  # the first signal's name
    when = 0.0  # it came
    deferred = 0  # depth of `stopping.at_steps`


request = Request()


def pass_on(by: str) -> None:
    """Send this process's main thread the signal of that name, unless it had one before or would die of it."""
    number = next(number for number, name in SIGNALS.items() if name == by)
    if request.by is None and callable(signal.getsignal(number)):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
