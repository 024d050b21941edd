"""Work on all cores, by worker processes that never outlive the command.

    sizes = results(write, [(path, images), ...], processes=4)     # in the order of the work

Ctrl-C, and a cluster's SIGTERM or SIGUSR1, go to a whole process group. The workers block these signals, and the parent
kills the workers. So no worker writes into a folder that the parent is deleting. A worker that dies otherwise (out of
memory) is an error. A worker whose parent was killed ends after its piece of work.

Each worker has a pipe of its own. `concurrent.futures.ProcessPoolExecutor` has one queue for all workers, which fails
twice. After a worker was killed while it sent a result, the executor waits for the rest of it for ever. And each worker
holds both ends of the queue, so it outlives a parent that was killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, TypeVar

from upcycle_bench.util.errors import UserError

WAIT = 1800  # seconds: more than any piece of work takes, or any batch of a slow disk

T = TypeVar("T")


def results(
    call: Callable[..., T],
    work: Sequence[tuple[Any, ...]],
    processes: int,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, what: items,
    what: str = "",
) -> list[T]:
    """`call(*arguments)` for each tuple of `work`, in the order of `work`, by at most `processes` processes.

    `call`, its arguments and its results must be picklable. `track(items, what)` passes one item for each piece of work
    that is done, and may show progress. Raises what a call raises, and UserError where a worker died, or none finished
    anything for half an hour.
    """
    found: dict[int, T] = {}
    with _workers(call, min(processes, len(work))) as pipes:
        finished = _finished(work, pipes)
        for _ in track(range(len(work)), what):
            try:
                number, result, error = next(finished)
            except TimeoutError:
                raise UserError(f"{what}: no worker finished anything in {WAIT:,} seconds; try again.") from None
            except (EOFError, OSError):  # the pipe ended, between two messages or within one
                raise UserError(f"{what}: a worker was killed, perhaps for want of memory; try again.") from None
            if error is not None:
                raise error
            found[number] = result
    return [found[number] for number in range(len(work))]


def _finished(work: Sequence[tuple[Any, ...]], pipes: Sequence[Connection]) -> Iterator[tuple[int, Any, Any]]:
    """(number, result, error) of each piece of work when it is done; a worker has one piece at a time."""
    numbers = iter(range(len(work)))
    at: dict[Connection, int] = {}

    def give(pipe: Connection) -> None:
        if (number := next(numbers, None)) is not None:
            pipe.send(work[number])
            at[pipe] = number

    for pipe in pipes:
        give(pipe)
    while at:
        if not (finished := wait(list(at), WAIT)):
            raise TimeoutError
        for ready in finished:
            assert isinstance(ready, Connection)
            number = at.pop(ready)
            result, error = ready.recv()
            give(ready)
            yield number, result, error


@contextlib.contextmanager
def _workers(call: Callable[..., Any], processes: int) -> Iterator[list[Connection]]:
    """Pipes to that many workers, which are killed at the end."""
    context = multiprocessing.get_context("spawn")  # the caller's threads (torch, rich) must not be forked
    resource_tracker.ensure_running()  # every spawn needs it, and starting it would undo the signal mask
    started = []
    pipes: list[Connection] = []
    # A process that is started now inherits the mask. The parent gets the signals as soon as it lifts the mask.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    try:
        try:
            for _ in range(processes):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(call, there), daemon=True)
                with _without_main():
                    process.start()
                there.close()  # now the worker alone holds this end, and its death ends the pipe
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


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Let no worker run the caller's script again, which may lack `if __name__ == "__main__"`; no call stands in it."""
    main = sys.modules["__main__"]
    before: dict[str, Any] = {name: vars(main)[name] for name in ("__spec__", "__file__") if name in vars(main)}
    main.__spec__ = None
    vars(main).pop("__file__", None)
    try:
        yield
    finally:
        vars(main).update(before)


def _serve(call: Callable[..., Any], pipe: Connection) -> None:
    """The worker's loop; it ends when the parent closes the pipe."""
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            arguments = pipe.recv()
            try:
                message = ForkingPickler.dumps((call(*arguments), None))
            except BaseException as error:  # the parent raises it
                message = ForkingPickler.dumps((None, portable(error)))
            pipe.send_bytes(message)  # `recv` unpickles it


def portable(error: BaseException) -> BaseException:
    """The error itself, or a RuntimeError with its traceback where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


def process_started(pid: int) -> str | None:
    """When a process of this machine was started, in a form that only compares; None where it has ended."""
    try:
        os.kill(pid, 0)
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name may have spaces
    except ProcessLookupError:
        return None
    except OSError:  # another user's, or no Linux
        return "" if not Path(f"/proc/{os.getpid()}").exists() or Path(f"/proc/{pid}").exists() else None
    return None if after_name[0] in "ZX" else after_name[19]  # a zombie has ended


def process_space() -> str:
    """Names the machine and, on Linux, the container, within which process numbers are the same for all."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return " ".join(parts)
