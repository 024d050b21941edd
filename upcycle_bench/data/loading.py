"""Items that worker processes make ahead, in order; every wait for a worker has an end.

    with lost_workers():                                        # around all that happens between two items
        for batch in load(make, range(100), workers=4, what="training batches"): ...

A worker of torch's DataLoader puts what it made into shared memory in a thread of its own. Where that fails, as in a
container whose /dev/shm has 64 MB, the thread prints an error, the item is lost, and the main process waits for ever.
So the worker packs an item itself. What does not fit into shared memory goes through the pipe, which is slower, and one
process of each machine says so.

A cluster signals all processes of a job, perhaps several times, and the training needs its workers for the step that it
is in. So a worker takes no notice of a signal until the loader is closed, or the main process ends.
"""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from functools import lru_cache, partial
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import torch.multiprocessing  # noqa: F401  (teaches ForkingPickler to put tensors into shared memory)
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from upcycle_bench.util.errors import UserError
from upcycle_bench.util.processes import WAIT, portable

T = TypeVar("T")
POLL = 2.0  # seconds between two looks after the parent
DIED = "DataLoader"  # so begin torch's errors about workers


def load(
    make: Callable[[int], T], items: Iterable[int], workers: int, what: str, prefetch: int = 2
) -> Generator[T, None, None]:
    """`make(item)` for each of `items`, in their order, made ahead by at most `workers` processes; none: made here.

    Item n is made by worker n modulo `workers`, and each is up to `prefetch` items ahead. The workers are forks, so
    `make` need not be picklable, and begin at once. Raises what `make` raises, and UserError where a worker was killed,
    or an item took longer than half an hour.
    """
    workers = min(workers, len(items)) if isinstance(items, Sized) else workers
    if not workers:
        return (make(item) for item in items)
    loader: DataLoader[bytes] = DataLoader(
        _Packed(make),
        batch_size=None,
        sampler=items,
        num_workers=workers,
        prefetch_factor=prefetch,
        collate_fn=bytes,
        timeout=WAIT,
        worker_init_fn=partial(_deaf_until, closed := mmap.mmap(-1, 1), os.getpid()),  # the memory of all forks
        multiprocessing_context="fork",
    )
    _open.add(closed)
    taken = _taken(iter(loader), what, closed)
    next(taken)
    return taken


def _taken(packed: Iterator[bytes], what: str, closed: mmap.mmap) -> Generator[Any, None, None]:
    """First None, so that its end is reached whatever happens; then what workers have packed, one after the other."""
    try:
        yield None
        while True:
            with lost_workers(what):
                try:
                    if (content := next(packed, None)) is None:
                        return
                    made, error, room = pickle.loads(content)
                except (EOFError, OSError, pickle.UnpicklingError) as died:  # while it handed over the item
                    raise RuntimeError(f"{DIED}: {died or type(died).__name__}") from None
            if error is not None:
                raise error
            if not room and os.environ.get("LOCAL_RANK", "0") == "0":
                _say_small(what)
            yield made
    finally:
        _unwatch(packed)
        closed[0] = 1
        _open.discard(closed)


def _unwatch(packed: Any) -> None:
    """Deaths of its workers are no news any more: torch raises at once, whatever runs, and that may be a clean-up."""
    if getattr(packed, "_worker_pids_set", False):
        packed._worker_pids_set = False
        signal_handling._remove_worker_pids(id(packed))


_open: set[mmap.mmap] = set()  # of loaders that are at work


@atexit.register  # before that of multiprocessing, which signals the workers and waits for them
def _close_all() -> None:
    for closed in _open:
        closed[0] = 1


def _deaf_until(closed: mmap.mmap, parent: int, worker: int) -> None:
    """What a worker does first."""

    def watch() -> None:  # torch's own watch takes for the parent whoever is it by then
        while os.getppid() == parent:
            time.sleep(POLL)
        os._exit(0)

    def handle(number: int, frame: Any) -> None:
        if closed[0]:
            os._exit(0)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handle)
    threading.Thread(target=watch, name="watch", daemon=True).start()


@lru_cache(None)  # once for each
def _say_small(what: str) -> None:
    print(
        f"warning: /dev/shm has no room for {what}, which now come through pipes and slower; a container gets "
        "more by --shm-size=8g.",
        file=sys.stderr,
    )


@contextlib.contextmanager
def lost_workers(what: str = "training batches") -> Iterator[None]:
    """UserError where a worker died, which torch tells at once, whatever runs meanwhile; or where nothing came."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(DIED):
            raise
        why = " ".join(str(error).split()).rstrip(".")
        cause = "" if "Terminated" in why else ", perhaps for want of memory"
        raise UserError(f"{what}: a process that loads them was lost{cause} ({why}); try again.") from None


class _Packed(Dataset[bytes]):
    """Item -> the pickled (result, error, room), for the workers; room: whether shared memory took the result."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __getitem__(self, item: int) -> bytes:
        try:
            made = self.make(item)
        except Exception as error:
            return pickle.dumps((None, portable(error), True))
        try:
            return bytes(ForkingPickler.dumps((made, None, True)))  # tensors are put into shared memory
        except (RuntimeError, OSError):  # it is full
            return pickle.dumps((made, None, False))
