"""What this process was asked by SIGTERM, SIGUSR1 or `--stop-after`, and `Stopped`, by which it ends. Imports little.

    request.by                      # "SIGTERM", or None
    pass_on("SIGTERM")              # another rank got it: as if this process had got it, too
    request.unheard()               # "SIGTERM", where the main thread is in a call that does not let Python hear it

`training.stopping` handles the signals; `util.first_cause` tells the other ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

STATUS = 75  # EX_TEMPFAIL of sysexits.h: not finished; type the same command again
DEAF = 2.0  # seconds after which a signal counts as unheard
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
    _pipe: tuple[int, int] | None = None  # into which Python writes the number of each signal, whatever runs
    _before = -1
    _came: tuple[str, float] | None = None

    def listen(self) -> None:
        """From now on `unheard` knows. Only for the main thread."""
        self._pipe, self._came = os.pipe(), None
        for end in self._pipe:
            os.set_blocking(end, False)
        self._before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)

    def listen_no_more(self) -> None:
        """The end of `listen`, in the same thread."""
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            signal.set_wakeup_fd(self._before)
            for end in pipe:
                os.close(end)

    def unheard(self) -> str | None:
        """The first signal, if the main thread has not heard it for DEAF seconds, outside a training's steps.

        So it is in a collective that waits for a rank which works alone for hours.
        """
        with contextlib.suppress(OSError, TypeError):  # nothing came, or nobody listens
            for number in os.read(self._pipe[0], 4096):  # type: ignore[index]
                if number in SIGNALS and self._came is None:
                    self._came = SIGNALS[signal.Signals(number)], time.monotonic()
        if self._came is None or self.by is not None or self.deferred:
            return None
        name, when = self._came
        return name if time.monotonic() - when > DEAF else None

    def forked(self) -> None:
        """In a process that this one has forked: its signals are not this one's."""
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            self._pipe = None


request = Request()
os.register_at_fork(after_in_child=request.forked)


def pass_on(by: str) -> None:
    """Send this process's main thread the signal of that name, unless it had one before or would die of it."""
    number = next(number for number, name in SIGNALS.items() if name == by)
    if request.by is None and callable(signal.getsignal(number)):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
