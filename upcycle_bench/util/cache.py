"""The cache folder: files and folders that are built once, and locks between processes.

    path = build_once(cache_root() / "worlds" / "digits-1-seed0", build)      # build(staging: Path) -> None

    with locked(path): ...                              # one process at a time

`build_once` builds beside the final place and then renames, so a file or folder at its final name is complete. A crash
leaves at most a hidden `.NAME.*.tmp` folder, which nothing reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import full_disk_said
from upcycle_bench.util.locks import Attempt, hold, hold_now


def cache_root() -> Path:
    """$UPCYCLE_BENCH_CACHE, else $XDG_CACHE_HOME/upcycle-bench, else ~/.cache/upcycle-bench; always absolute."""
    if own := os.environ.get("UPCYCLE_BENCH_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "upcycle-bench"


@contextlib.contextmanager
def locked(path: Path, what: str = "") -> Iterator[None]:
    """Hold the lock of `path`, so that no second process does the same long work. `path` need not exist.

    The process that waited for the lock must check the cache again. `what` names the work while others wait. Raises
    UserError where the cache folder cannot be written.
    """
    name = _lock_of(path)
    with contextlib.ExitStack() as held:
        with _written(name):
            name.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(hold(name, what or str(path)))
        yield


@contextlib.contextmanager
def locked_now(path: Path) -> Iterator[bool]:
    """Hold the lock of `path` unless another process does; the block gets whether it is free, and never waits."""
    name = _lock_of(path)
    if not name.exists() and not name.with_name(f"{name.name}.lease").exists():  # nobody has it: nothing is written
        yield True
        return
    with hold_now(name) as held:
        yield held


def attempt(path: Path) -> Attempt:
    """The lock of `path`, to be tried again and again. UserError where the cache folder cannot be written."""
    name = _lock_of(path)
    with _written(name):
        name.parent.mkdir(parents=True, exist_ok=True)
        return Attempt(name)


@contextlib.contextmanager
def _written(name: Path) -> Iterator[None]:
    """UserError where the block cannot write the lock of that name."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {name.parent}: {error.strerror}; set UPCYCLE_BENCH_CACHE to another one."
        ) from None


def _lock_of(path: Path) -> Path:
    return cache_root() / "locks" / hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:24]


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Return `path`. If it does not exist, `build(staging)` first writes a file or folder at `staging`.

    When two processes build at once, the first to finish wins. The other deletes its work and uses the winner's.
    Raises UserError where the folder cannot be written or its disk is full, and whatever else `build` raises.
    """
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A rename is atomic only within one file system.
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {path.parent}: {error.strerror}; set UPCYCLE_BENCH_CACHE to another one."
        ) from None
    try:
        staging = temporary / path.name
        with full_disk_said(path):
            build(staging)
        _move_unless_there(staging, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _move_unless_there(source: Path, target: Path) -> None:
    try:
        if source.is_dir():
            os.rename(source, target)  # fails where the winner's folder stands
        else:
            os.link(source, target)  # unlike a rename, it never replaces the winner's file
    except OSError:
        if not target.exists():  # nobody else won: the file system has no hard links, or the rename raises again
            os.rename(source, target)
