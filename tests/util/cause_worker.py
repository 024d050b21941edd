"""test_first_cause starts `main` in three processes: each watches the others, and fails in one of several ways."""

import contextlib
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from upcycle_bench.training.stopping import at_steps, stoppable
from upcycle_bench.util import first_cause
from upcycle_bench.util.connection import Connection
from upcycle_bench.util.errors import DivergedError, UserError

WORLD = 3


def main(rank: int, port: int, way: str, output: Path) -> None:
    """One rank, of which rank 0 has the store; what it says goes to the file `output`."""
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    first_cause.GRACE, first_cause.SILENCE, first_cause.SUSPICION, first_cause.NEWS = 1.0, 6.0, 4.0, 1.5
    first_cause.STOP = 1.0
    if way == "stop":  # as if each rank had a machine of its own
        first_cause.process_space = lambda: str(rank)
    first_cause.in_collective = lambda error: isinstance(error, dist.DistError)  # here the store breaks
    store = dist.TCPStore("127.0.0.1", port, WORLD, is_master=rank == 0, timeout=timedelta(seconds=1))
    if way == "cut" and rank == 2:
        first_cause._Watch._dead = cut_twice(first_cause._Watch._dead)
        Connection._require_listening = out_once(Connection._require_listening)
    say = first_cause.last_word(lambda error: print(first_cause.reason(error)))
    stopping = stoppable() if way in ("asked", "deaf") else contextlib.nullcontext()
    try:
        with stopping, first_cause.watching(store, rank, WORLD), say:
            work(store, rank, way)
    except BaseException as error:
        print("ends with", type(error).__name__)
        sys.exit(getattr(error, "status", getattr(error, "code", 3)))


def work(store: dist.TCPStore, rank: int, way: str) -> None:
    """What a rank does until it fails, or until the others should have noticed."""
    store.barrier("together", WORLD, timedelta(seconds=60))
    if way == "all":
        raise UserError("what all find")
    if way == "nan":
        raise DivergedError("nan", rank=2)
    if way == "shut" and rank == 0:  # the machine of the store is gone
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "leave":  # done, one earlier than the others
        time.sleep(0 if rank == 2 else 5)
        return
    if way == "asked":
        asked(store, rank)
    if way == "deaf":
        deaf(store, rank)
    if way == "cut":
        time.sleep(11)  # longer than SILENCE
        return
    if rank == 2:
        match way:
            case "raise" | "hang" | "interrupt":
                raise ValueError("my own fault")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
    if way == "hang":
        time.sleep(100)  # as in a collective of NCCL, which nothing ends
    time.sleep(0.2)
    if way == "interrupt":  # a launcher ends all when one has ended, and SIGTERM is heard first
        raise KeyboardInterrupt
    store.get("never")  # as in a collective of gloo, which breaks


def asked(store: dist.TCPStore, rank: int) -> None:
    """Rank 2 is asked to stop where it can at once; rank 0 is in a training; rank 1 hears nothing, as within NCCL."""
    if rank == 1:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        time.sleep(100)
    if rank == 2:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(100)
    with at_steps():
        signal.raise_signal(signal.SIGTERM)
        store.get("never")


def deaf(store: dist.TCPStore, rank: int) -> None:
    """Rank 2 is asked to stop in a call that does not let Python hear of it, as when rank 0 calibrates alone."""
    if rank == 2:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        store.set_timeout(timedelta(seconds=100))
        store.get("never")
    time.sleep(100)


def out_once(require: Any) -> Any:
    """`require`, which at its first call finds nobody."""
    calls = iter(range(1000))

    def out(line: Any) -> None:
        if next(calls) == 0:
            raise dist.DistNetworkError("no route to host")
        require(line)

    return out


def cut_twice(look: Any) -> Any:
    """`look`, which at its third and its eighth call finds a network that fails for a moment."""
    calls = iter(range(1000))

    def cut(watch: Any, patience: float) -> int | None:
        if next(calls) in (2, 7):
            raise dist.DistNetworkError("connection reset")
        found: int | None = look(watch, patience)
        return found

    return cut
