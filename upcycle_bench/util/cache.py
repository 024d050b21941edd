"""The cache folder, and the one way in: built beside its place, then renamed into it.

    path = build_once(cache_root() / "worlds" / "digits-1-seed0", build)      # build(staging: Path) -> None

    with locked(path): ...                              # one process at a time

What stands at its final name is complete. A crash, Ctrl-C or a lost race leaves at most a hidden `.NAME.*.tmp` folder,
which nobody ever reads.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, SoftFileLock

from upcycle_bench.util.errors import UserError

NO_FLOCK = {errno.ENOLCK, errno.EOPNOTSUPP}  # what NFS without its lock service, and some FUSE file systems, answer


def cache_root() -> Path:
    """$UPCYCLE_BENCH_CACHE, else $XDG_CACHE_HOME/upcycle-bench, else ~/.cache/upcycle-bench; always absolute."""
    if own := os.environ.get("UPCYCLE_BENCH_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and is to be ignored.
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "upcycle-bench"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time work towards `path`: for work so long that two should not both do it.

    The process that waited for the lock must check the cache again. The lock goes with the process, however it ends.
    Where the file system has no flock, a file that names its holder is the lock.
    """
    name = cache_root() / "locks" / hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:24]
    with contextlib.ExitStack() as held:
        try:
            name.parent.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(FileLock(name))  # takes the soft lock by itself where the error is ENOSYS
            except OSError as error:
                if error.errno not in NO_FLOCK:
                    raise
                # Another name: what FileLock made there would look like the soft lock of somebody else.
                held.enter_context(SoftFileLock(name.with_suffix(".soft")))
        except OSError as error:
            raise UserError(
                f"cannot write to the cache folder {name.parent}: {error.strerror}; set UPCYCLE_BENCH_CACHE to another "
                "one."
            ) from None
        yield


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Return `path`; if it does not exist, `build(staging)` makes it first, as a file or a folder of the same name.

    Of two processes that build at once, the first to finish wins; the other discards its work and uses the winner's.
    Raises UserError where nothing can be written, and whatever `build` raises.
    """
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # On the same file system as `path`, or the rename would not be atomic.
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {path.parent}: {error.strerror}; set UPCYCLE_BENCH_CACHE to another one."
        ) from None
    try:
        staging = temporary / path.name
        build(staging)
        _move_unless_there(staging, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _move_unless_there(source: Path, target: Path) -> None:
    try:
        if source.is_dir():
            os.rename(source, target)  # fails where a folder with content stands
        else:
            os.link(source, target)  # a rename would silently replace the winner's file
    except OSError:
        if not target.exists():  # no lost race: a file system without hard links, or the rename fails again
            os.rename(source, target)
