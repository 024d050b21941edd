"""Work on all cores, by processes that end with the command however it ends.

    sizes = results(write, [(path, images), ...], processes=4)     # in the order of the work

Ctrl-C, and a cluster's SIGTERM, go to a whole process group. The workers do not hear them: the parent does, drops the
work that has not begun, and waits for the little that has, so that nobody writes into a folder which is being deleted.
A worker that dies all the same (out of memory) is an error and no wait without end; one whose parent dies ends too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from upcycle_bench.errors import UserError

T = TypeVar("T")


def results(
    call: Callable[..., T],
    work: Iterable[tuple[Any, ...]],
    processes: int,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, what: items,
    what: str = "",
) -> list[T]:
    """`call(*arguments)` for each of `work`, in order, by that many processes; `track` shows how it goes.

    Raises what a call raises, and UserError where a worker was killed.
    """
    # spawned, since the caller's threads (torch, rich) must not be forked
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_follow_parent)
    try:
        with _deaf():
            jobs = [pool.submit(call, *arguments) for arguments in work]
        return [job.result() for job in track(jobs, what)]
    except BrokenProcessPool:
        raise UserError(f"{what}: a worker process was killed, perhaps for want of memory; try again.") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """What is started within inherits that SIGINT and SIGTERM are blocked; here they come when it is over."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow_parent() -> None:
    """In a worker: end when the parent is gone, which could not say so any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
