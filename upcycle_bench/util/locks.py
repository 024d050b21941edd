"""A lock between processes, also of several machines, on whatever file system there is; a wait for it is said.

    with hold(Path("cache/locks/abc"), "the dense model"): ...

Two locks are held. flock ends with its process at once, but some file systems do not have it, and some have it for one
machine only. The other one is a file `NAME.lease` that names its holder, which touches it. It is free again as soon as
the holder's process is gone from the same machine, or has not touched it for LEASE seconds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout

from upcycle_bench.util.processes import process_started

LEASE = 60.0  # seconds
SOON, AGAIN = 5.0, 600.0  # seconds until a wait is said, and said again
# Lustre without its mount option, NFS without its lock service, some FUSE file systems.
NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextlib.contextmanager
def hold(file: Path, what: str) -> Iterator[None]:
    """Hold the lock `file` during the block; `what` names the work while others wait. OSError where it cannot write."""
    lease = _lease(file, what)
    with contextlib.ExitStack() as held:
        for lock in [FileLock(file), lease] if _has_flock(file) else [lease]:
            _acquire(lock, lease, what)
            held.callback(lock.release)
        yield


@contextlib.contextmanager
def hold_now(file: Path) -> Iterator[bool]:
    """Hold the lock `file` unless another process does; the block gets whether it is held. Never waits."""
    lock = Attempt(file)
    try:
        yield lock.take()
    finally:
        lock.release()


class Attempt:
    """A lock that is tried again and again, and never waited for.

        lock = Attempt(Path("cache/locks/abc"))
        while not lock.take(): ...              # other work
        lock.release()

    Keep the object: a holder on another machine counts as dead once this one has seen its lease stand still.
    """

    def __init__(self, file: Path) -> None:
        self._lease = _lease(file, str(file))
        self._locks: list[BaseFileLock] = [FileLock(file), self._lease] if _has_flock(file) else [self._lease]

    def take(self) -> bool:
        """Whether this process holds the lock now. OSError where it cannot write."""
        try:
            for lock in self._locks:
                lock.acquire(timeout=0)
        except Timeout:
            self.release()
            return False
        return True

    def release(self) -> None:
        """Let go of the lock, where it is held."""
        for lock in reversed(self._locks):
            lock.release()

    def holder(self) -> str | None:
        """Who has the lock, as its lease says: `process 12 on node3`, which may be dead there; None for nobody."""
        return _holder(self._lease)


def _lease(file: Path, what: str) -> SoftFileLease:
    return SoftFileLease(
        file.with_name(f"{file.name}.lease"),
        lease_duration=LEASE,
        on_compromise=lambda _: _say(f"warning: another process took the lock of {what}; did this one stand still?"),
    )


def _has_flock(file: Path) -> bool:
    with file.open("a+") as probe:  # NFSv4 refuses a shared lock of a file that is not readable
        try:
            fcntl.flock(probe, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            _warn_once(str(file.parent), os.strerror(error.errno))
            return False
    return True


def _acquire(lock: BaseFileLock, lease: SoftFileLease, what: str) -> None:
    began, patience = time.monotonic(), SOON
    while True:
        try:
            lock.acquire(timeout=patience, poll_interval=0.1)
            return
        except Timeout:
            by, waited = _holder(lease) or "another process", time.monotonic() - began
            _say(f"waiting for {what}: {by} is at it, for {waited:,.0f} s so far")
            patience = AGAIN


def _holder(lease: SoftFileLease) -> str | None:
    owner = lease.owner
    if owner is None:
        return None
    host = owner.hostname.partition("?")[0]  # behind it stands a container's number
    died = host == socket.gethostname() and process_started(owner.pid) is None
    return None if died else f"process {owner.pid} on {host}"


@functools.cache
def _warn_once(folder: str, why: str) -> None:
    _say(
        f"warning: the file system of {folder} has no file locks (flock: {why}); files with a heartbeat take their "
        f"place, and after a machine is lost others wait {LEASE:.0f} s."
    )


def _say(line: str) -> None:
    """On rank 0, as far as a launcher has told: the others of a run wait for the same."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
