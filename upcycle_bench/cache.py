"""The cache folder, and the one way in: built beside its place, then renamed into it.

    path = build_once(cache_root() / "worlds" / "digits-1-seed0", build)      # build(staging: Path) -> None

    with locked(path): ...                              # one process at a time

What stands at its final name is complete. A crash, Ctrl-C or a lost race leaves at most a hidden `.NAME.*.tmp` folder,
which nobody ever reads.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from upcycle_bench.environment import cores
from upcycle_bench.errors import UserError


def require_writable(folder: Path, option: str) -> None:
    """UserError unless `folder` (or, while it does not exist, the nearest folder above it) takes files."""
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    try:  # os.access allows root everything, a file system without writing such as /proc included
        tempfile.TemporaryFile(dir=parent).close()
    except OSError:
        raise UserError(f"{option} {folder}: {parent} is not a folder that can be written; choose another.") from None


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, read in pieces."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            sha.update(piece)
    return sha.hexdigest()


def files_sha256(paths: Iterable[Path]) -> list[str]:
    """`file_sha256` of each, by as many threads as there are cores: reading and hashing let others run."""
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(file_sha256, paths))


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

    Who had to wait must look again whether the work is done. The lock goes with the process, however it ends.
    """
    folder = cache_root() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:24]).open("w")
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {folder}: {error.strerror}; set UPCYCLE_BENCH_CACHE to another one."
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
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
