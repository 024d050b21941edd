"""Work on all cores, by processes that end with the command however it ends.

    sizes = results(write, [(path, images), ...], processes=4)     # in the order of the work

Ctrl-C, and a cluster's SIGTERM, go to a whole process group. The workers do not hear them; the parent does. It kills
the workers, so that no worker writes into a folder which is being deleted. A worker that dies otherwise (out of memory)
is an error. A worker whose parent dies ends when its piece of work is done.

Each worker has a pipe of its own. `concurrent.futures.ProcessPoolExecutor` has one queue for all workers, which fails
twice: a worker killed while it sends a result leaves half of it there, and the executor waits for the rest for ever;
and workers hold both ends of the queue, so that they outlive a parent that was killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

from upcycle_bench.util.errors import UserError

T = TypeVar("T")


def results(
    call: Callable[..., T],
    work: Sequence[tuple[Any, ...]],
    processes: int,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, what: items,
    what: str = "",
) -> list[T]:
    """`call(*arguments)` for each of `work`, in order, by at most that many processes; `track` shows how it goes.

    Raises what a call raises, and UserError where a worker died.
    """
    found: dict[int, T] = {}
    with _workers(call, min(processes, len(work))) as pipes:
        finished = _finished(work, pipes)
        for _ in track(range(len(work)), what):
            try:
                number, result, error = next(finished)
            except (EOFError, OSError):  # its pipe ends, between messages or within one
                raise UserError(f"{what}: a worker was killed, perhaps for want of memory; try again.") from None
            if error is not None:
                raise error
            found[number] = result
    return [found[number] for number in range(len(work))]


def _finished(work: Sequence[tuple[Any, ...]], pipes: Sequence[Connection]) -> Iterator[tuple[int, Any, Any]]:
    """(its number, result, error) of each piece of work as it is done; every worker has one piece at a time."""
    numbers = iter(range(len(work)))
    at: dict[Connection, int] = {}

    def give(pipe: Connection) -> None:
        if (number := next(numbers, None)) is not None:
            pipe.send(work[number])
            at[pipe] = number

    for pipe in pipes:
        give(pipe)
    while at:
        for ready in wait(list(at)):
            assert isinstance(ready, Connection)
            number = at.pop(ready)
            result, error = ready.recv()
            give(ready)
            yield number, result, error


@contextlib.contextmanager
def _workers(call: Callable[..., Any], processes: int) -> Iterator[list[Connection]]:
    """Pipes to that many workers, which are gone afterwards."""
    context = multiprocessing.get_context("spawn")  # the caller's threads (torch, rich) must not be forked
    resource_tracker.ensure_running()  # which every spawn needs; its start would undo the mask
    started = []
    pipes: list[Connection] = []
    # What is started now inherits the mask. Here the signals come when it is lifted.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        try:
            for _ in range(processes):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(call, there), daemon=True)
                process.start()
                there.close()  # so that its death is the end of the pipe
                started.append(process)
                pipes.append(here)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in started:
            process.kill()
        for process in started:
            process.join()


def _serve(call: Callable[..., Any], pipe: Connection) -> None:
    """A worker's life: until the parent closes the pipe."""
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            arguments = pipe.recv()
            try:
                message = ForkingPickler.dumps((call(*arguments), None))
            except BaseException as error:  # the parent's to raise
                message = ForkingPickler.dumps((None, _portable(error)))
            pipe.send_bytes(message)  # what `recv` takes


def _portable(error: BaseException) -> BaseException:
    """The same, or what can be said of it if it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
