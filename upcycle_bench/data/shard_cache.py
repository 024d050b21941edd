"""Copies of shards that lie elsewhere, on this machine's disk; the least recently used ones make room for others.

    file = opened("pipe:aws s3 cp s3://bucket/000.tar -")       # made once; other processes wait for it
    content = patiently(place, lambda: fs.cat_file(path))       # three more tries, with pauses

The folder is `shards` in $UPCYCLE_BENCH_LOCAL_CACHE, which may differ on each node, else in the cache. It holds at most
$UPCYCLE_BENCH_SHARD_CACHE bytes, such as 50GB, and always the last copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import UserError, one_line
from upcycle_bench.util.files import atomic, disk_is_full
from upcycle_bench.util.locks import hold

T = TypeVar("T")
PIPE = "pipe:"
LIMIT = "50GB"
PAUSES = (1.0, 2.0, 4.0)  # seconds between two tries
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def local_root() -> Path:
    """$UPCYCLE_BENCH_LOCAL_CACHE, a folder of this machine alone, else the cache; always absolute."""
    own = os.environ.get("UPCYCLE_BENCH_LOCAL_CACHE")
    return Path(own).expanduser().absolute() if own else cache_root()


def limit() -> int:
    """$UPCYCLE_BENCH_SHARD_CACHE in bytes; UserError for what is no number of bytes."""
    text = os.environ.get("UPCYCLE_BENCH_SHARD_CACHE") or LIMIT
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B|)", text.strip().upper())
    if not match:
        raise UserError(f"UPCYCLE_BENCH_SHARD_CACHE={text!r} is no number of bytes; write it as 50GB or 500000000.")
    return int(float(match[1]) * UNITS[match[2]])


def copy_of(place: str) -> Path:
    """Where the copy of a shard is, or would be."""
    return local_root() / "shards" / f"{hashlib.sha256(place.encode()).hexdigest()[:24]}.tar"


def opened(place: str, pauses: Sequence[float] | None = None) -> io.FileIO:
    """The copy of a shard, open; made first if there is none, with such pauses between the tries.

    UserError where the shard or the disk does not let it, Unreachable where the tries fail.

    What is open can be read even where another process deletes the copy, as it may at once in a small cache.
    """
    path, most = copy_of(place), limit()
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return used(io.FileIO(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        with hold(path.with_suffix(".lock"), f"the copy of {place}"):
            with contextlib.suppress(FileNotFoundError):  # another process has made it
                return used(io.FileIO(path))
            file = patiently(place, lambda: _fetch(place, path), pauses)
            _make_room(path, most)
            return file
    except OSError as error:
        raise UserError(
            f"cannot write to the shard cache {path.parent}: {error.strerror or error}; set "
            "UPCYCLE_BENCH_LOCAL_CACHE to another folder."
        ) from None


def used(file: io.FileIO) -> io.FileIO:
    """The open copy, which is the most recently used one now."""
    with contextlib.suppress(OSError):  # another user made it
        os.utime(file.fileno())
    return file


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it; UserError where its package is missing.

    It must not be kept for a fork: fsspec makes another one for each process.
    """
    from fsspec.core import url_to_fs

    try:
        found: tuple[Any, str] = url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{address}: {one_line(error)}; pip install 'upcycle-bench[remote]' has s3, gs, https."
        ) from None
    return found


class Unreachable(UserError):
    """What cannot be read now, and perhaps later; `why` is a part of the line."""

    def __init__(self, place: str, why: str) -> None:
        super().__init__(f"{place}: it cannot be read ({why}); try again later.")
        self.why = why


def patiently(place: str, call: Callable[[], T], pauses: Sequence[float] | None = None) -> T:
    """What `call` returns, tried again after each of the pauses, PAUSES if not given; Unreachable when all tries fail.

    A file that is not there, or may not be read, and a full disk are not tried again: UserError, which names `place`.
    """
    pauses = PAUSES if pauses is None else pauses
    for pause in (*pauses, None):
        try:
            return call()
        except UserError:
            raise
        except (FileNotFoundError, PermissionError) as error:
            what = "it is not there" if isinstance(error, FileNotFoundError) else "it may not be read"
            raise UserError(f"{place}: {what} ({one_line(error)}).") from None
        except Exception as error:  # each object store has its own errors
            if disk_is_full(error):
                raise UserError(f"{place}: it cannot be read ({one_line(error)}); try again later.") from None
            if pause is None:
                times = f", tried {len(pauses) + 1} times" if pauses else ""
                raise Unreachable(place, f"{one_line(error)}{times}") from None
            time.sleep(pause)
    raise AssertionError


def _fetch(place: str, path: Path) -> io.FileIO:
    """Write the copy; it is open before it is at its place."""
    with atomic(path) as part:
        if place.startswith(PIPE):
            _run(place.removeprefix(PIPE), part)
        else:
            fs, name = file_system(place)
            fs.get_file(name, str(part))
        return io.FileIO(part)


def _run(command: str, output: Path) -> None:
    # With bash, what fails before a | fails the whole.
    shell = ["bash", "-o", "pipefail", "-c"] if shutil.which("bash") else ["sh", "-c"]
    with output.open("wb") as file:
        done = subprocess.run([*shell, command], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE)
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())[-200:]
        raise RuntimeError(f"the command ended with {done.returncode}: {said or 'it said nothing'}")


def _make_room(newest: Path, most: int) -> None:
    """Delete the copies that were used longest ago; who has one open may read on."""
    copies = []
    for path in newest.parent.glob("*.tar"):
        try:
            copies.append((path.stat().st_mtime, path.stat().st_size, path))
        except FileNotFoundError:  # another process makes room, too
            continue
    total = sum(size for _, size, _ in copies)
    for _, size, path in sorted(copies):
        if total <= most:
            return
        if path != newest:
            path.unlink(missing_ok=True)
            total -= size
