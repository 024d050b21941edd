"""How a training is asked to end early: by SIGTERM, SIGUSR1 or the end of `--stop-after`. Imports nothing heavy.

    until = time.monotonic() + seconds("3h50m")
    with stoppable(until):                  # around a command: the first signal ends it, with status 75
        with at_steps():                    # around a training: the first signal only asks it to stop
            if asked_to_stop(group): ...    # at a step's end: write a checkpoint, then `raise Stopped(...)`

A second signal, five seconds or more after the first, ends at once: a cluster and torchrun may both signal a rank. A
process that this one forked, such as a loader of batches, takes no notice of the first:
a cluster signals all processes of a job, and the training needs its loaders for the step it is in.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from upcycle_bench.util.errors import UserError
from upcycle_bench.util.stop_request import SIGNALS, STATUS, Stopped, request

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["SIGNALS", "STATUS", "Stopped", "asked_to_stop", "at_steps", "seconds", "stoppable"]

TOGETHER = 5.0  # seconds in which further signals are the same request
DURATION = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)|(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")


def seconds(text: str) -> int:
    """Seconds in 90, 90s, 45m, 3h50m or, as Slurm writes it, 3:50:00 or 1-02:00:00. UserError for others and for 0."""
    match = DURATION.fullmatch(text.strip())
    days, hours, minutes, rest, *units = (int(part or 0) for part in match.groups()) if match else (0,) * 8
    total = sum(
        number * factor
        for number, factor in zip((days, hours, minutes, rest, *units), (86400, 3600, 60, 1) * 2, strict=True)
    )
    if not total:
        raise UserError(f"--stop-after {text!r}: write a time as 90s, 45m, 3h50m or 1-02:00:00.")
    return total


@contextlib.contextmanager
def stoppable(until: float | None = None) -> Iterator[None]:
    """Within, the first signal ends this process by `Stopped`, or asks a training to (`at_steps`).

    So does the time `until`, by the clock `time.monotonic`. In another thread than the main one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker: the second signal comes from the process that waits for its end
            signal.signal(number, signal.SIG_DFL)
            return
        name, first = SIGNALS[signal.Signals(number)], request.by is None
        if not first and time.monotonic() - request.when < TOGETHER:
            return
        if first:
            request.by, request.when = name, time.monotonic()
        if not (first and request.deferred):
            raise Stopped(name)
        if os.environ.get("RANK", "0") == "0":  # os.write: a handler must not wait for the lock of a stream
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{name}: a checkpoint, then the end\n".encode())

    before: dict[signal.Signals, Any] = {number: signal.signal(number, handle) for number in SIGNALS}
    request.by, request.deferred = None, 0
    request.listen()
    if until is not None:
        signal.setitimer(signal.ITIMER_REAL, max(0.001, until - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        request.listen_no_more()
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: the handler was not set by Python
        request.by, request.deferred = None, 0


@contextlib.contextmanager
def at_steps() -> Iterator[None]:
    """Within, the first signal is kept for `asked_to_stop`. If nobody acts on it, it ends the process afterwards."""
    request.deferred += 1
    try:
        yield
    finally:
        request.deferred -= 1
    if request.by is not None and not request.deferred:
        raise Stopped(request.by)


def asked_to_stop(group: Any = None) -> str | None:
    """Which signal any rank got, or None; the same on every rank. Every rank of `group` (of the CPU) must call it."""
    if group is None:
        return request.by
    import torch
    import torch.distributed as dist

    names = list(SIGNALS.values())
    code = torch.tensor(names.index(request.by) + 1 if request.by else 0)
    dist.all_reduce(code, dist.ReduceOp.MAX, group=group)
    return names[int(code) - 1] if code else None
