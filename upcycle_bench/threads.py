"""Work whose result must not depend on how many threads a machine has, and what a core may do that they leave free."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from upcycle_bench import distributed
from upcycle_bench.environment import cores
from upcycle_bench.errors import UserError
from upcycle_bench.flops import carried, counting

T = TypeVar("T")
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
SHARE = "UPCYCLE_BENCH_CORES"  # how many cores are this process's, where others work beside it; `run --jobs` sets it


@contextmanager
def one_thread() -> Iterator[None]:
    """LAPACK and matrix products add up in another order with another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def own_cores() -> int:
    """Cores of this process and the other ranks of its run; UserError where $UPCYCLE_BENCH_CORES is no number."""
    text = os.environ.get(SHARE) or str(cores())
    if not text.isdecimal():
        raise UserError(f"{SHARE} must be a number of cores, not {text!r}.")
    return min(int(text), cores())


def core_is_free() -> bool:
    """Whether PyTorch's threads, on all ranks of this machine, leave a core."""
    return torch.get_num_threads() * distributed.local_world_size() < own_cores()


def spare_thread() -> ThreadPoolExecutor | None:
    """A thread that computes beside this one, with as many threads of PyTorch's; None where cores are not free for it.

    None also on a machine with a GPU, and while FLOPs are counted: that watches one thread.
    """
    return None if counting() or torch.cuda.is_available() else _spare_thread_if_free()


def beside(work: Callable[[], T]) -> Future[T]:
    """Begin `work`, which is the CPU's, in the spare thread, after what was begun before; or do it here and now.

    A GPU's machine has cores to spare for it. Its FLOPs count as this thread's.
    """
    thread = _spare_thread_if_free()
    if thread is not None:
        return thread.submit(carried(work))
    done: Future[T] = Future()
    done.set_result(work())
    return done


def shared(works: Iterable[Callable[[], None]], *, worth: bool = True) -> None:
    """Do all of them; where that is `worth` it, the spare thread does some, from the end, unless it is busy.

    Not on a machine with a GPU. FLOPs count as this thread's.
    """
    left = deque(works)

    def do(take: Callable[[], Callable[[], None]]) -> None:
        while True:
            try:
                work = take()
            except IndexError:  # none is left
                return
            work()

    here = threading.current_thread() is not threading.main_thread() or torch.cuda.is_available()
    thread = _spare_thread_if_free() if worth and not here else None
    if thread is None:
        do(left.popleft)
        return
    helper = thread.submit(carried(partial(do, left.pop)))
    try:
        do(left.popleft)
        if not helper.cancel():  # it has begun
            helper.result()
    finally:  # nothing goes on behind an error or Ctrl-C
        left.clear()
        if not helper.cancel():
            wait([helper])


def _spare_thread_if_free() -> ThreadPoolExecutor | None:
    threads = torch.get_num_threads()
    free = 2 * threads * distributed.local_world_size() <= own_cores()
    return _spare_thread(threads) if free or torch.cuda.is_available() else None


@functools.cache
def _spare_thread(threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(1, "spare", torch.set_num_threads, (threads,))  # OpenMP's number is each thread's own
    with _uninterrupted():  # while the executor starts its thread: it would lose it, and nothing would ever end it
        pool.submit(torch.get_num_threads).result()
    return pool


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM come afterwards. (Blocked for this thread alone, another one would take them.)"""
    if threading.current_thread() is not threading.main_thread():  # which is where they are raised
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set by Python
    for one in came:
        signal.raise_signal(one)
