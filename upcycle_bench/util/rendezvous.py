"""How the processes of one command find each other, and one line where they do not. Imports nothing heavy.

    require_sound()                          # what stands in the environment is no contradiction
    store = meet()                           # of torch.distributed, when all processes are there

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. The shell of a cluster's image or of a job step
may have them, too, with no other process anywhere, and torch would wait for it as long as for a collective.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from upcycle_bench.util.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

SOON = 10  # seconds after which the wait is said
PATIENCE = 60  # seconds in which all processes must have come
VARIABLE = "UPCYCLE_BENCH_RENDEZVOUS"  # other seconds
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # by several processes
REMEDY = "start all processes by torchrun, or unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE for one"


def require_sound() -> None:
    """Raise UserError where the variables of a launcher contradict each other, or some are missing."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    for name in (*NUMBERS, "MASTER_PORT") if several else NUMBERS:  # Kubernetes puts a URL into MASTER_PORT
        if not re.fullmatch("[0-9]{1,9}", text := os.environ.get(name, "0")):
            raise UserError(f"the environment has {name}={text!r}, which is no number; {REMEDY}.")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    for name, low, among in (("RANK", 0, world), ("LOCAL_RANK", 0, here), ("LOCAL_WORLD_SIZE", 1, world + 1)):
        if not low <= (number := int(os.environ.get(name, low))) < among:
            raise UserError(f"the environment has {name}={number}, but WORLD_SIZE={world}; {REMEDY}.")
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if world > 1 and missing:
        raise UserError(f"the environment has WORLD_SIZE={world}, but no {', '.join(missing)}; {REMEDY}.")


def meet() -> Store:
    """The store of all processes, two or more, after `require_sound`. UserError where they have not come in time."""
    import torch.distributed as dist

    if not re.fullmatch("[1-9][0-9]{0,5}", text := os.environ.get(VARIABLE, str(PATIENCE))):
        raise UserError(f"{VARIABLE} must be a number of seconds, not {text!r}.")
    rank, world, where = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    port = int(os.environ["MASTER_PORT"])
    try:
        with _said(f"waiting for all of {world} processes to come to {where}:{port}, for {text} s at most"):
            if rank != "0":
                _reach(where, port, float(text))  # torch would retry with pages of messages
            store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=int(text)))))
    except (dist.DistError, OSError) as error:
        raise UserError(
            f"waited {text} s for {world} processes to meet at {where}:{port} ({str(error).rstrip('.')}). RANK={rank} "
            f"and WORLD_SIZE={world} are set: {REMEDY}; {VARIABLE}={10 * int(text)} waits longer."
        ) from None
    return store


@contextlib.contextmanager
def _said(line: str) -> Iterator[None]:
    """Print the line on rank 0 if the block takes longer than SOON seconds."""
    timer = threading.Timer(SOON, print, [line], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if os.environ["RANK"] == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _reach(host: str, port: int, seconds: float) -> None:
    """Wait until something listens there; OSError, the last one, if nothing does in time."""
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(1.0, end - time.monotonic())).close()
        except OSError:
            if time.monotonic() + 0.5 > end:
                raise
            time.sleep(0.5)
