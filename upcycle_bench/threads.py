"""Work whose result must not depend on how many threads a machine has, and what a core may do that they leave free."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from upcycle_bench import distributed
from upcycle_bench.environment import cores
from upcycle_bench.errors import UserError
from upcycle_bench.flops import counting

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
    if not text.isdigit():
        raise UserError(f"{SHARE} must be a number of cores, not {text!r}.")
    return min(int(text), cores())


def core_is_free() -> bool:
    """Whether PyTorch's threads, on all ranks of this machine, leave a core."""
    return torch.get_num_threads() * distributed.local_world_size() < own_cores()


def spare_thread() -> ThreadPoolExecutor | None:
    """A thread that computes beside this one, with PyTorch's number of threads; None where no core is free for it.

    None also on a machine with a GPU, and while FLOPs are counted: that watches one thread.
    """
    if counting() or torch.cuda.is_available() or not core_is_free():
        return None
    return _spare_thread(torch.get_num_threads())


@functools.cache
def _spare_thread(threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(1, "spare", torch.set_num_threads, (threads,))  # OpenMP's number is each thread's own
    # An interrupt while the executor starts its thread may leave one of which it knows nothing, and which never ends.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        pool.submit(torch.get_num_threads).result()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pool
