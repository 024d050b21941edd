"""Where shards lie: a file, an address of an object store, or the output of a command.

    read("s3://bucket/000.tar", offset=1024, size=25_000)       # these bytes; fewer where the shard ends
    with open_place("pipe:ssh node cat 000.tar") as file: ...   # the whole shard, which can seek

Files are read at their place. Addresses are read in ranges by fsspec, or in the copy that the shard cache holds; what a
command prints is always copied (upcycle_bench/data/shard_cache.py). Any thread, and any fork, may read.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple, TypeVar

from upcycle_bench.data import shard_cache
from upcycle_bench.data.shard_cache import PIPE, file_system, patiently
from upcycle_bench.util.errors import UserError

_T = TypeVar("_T")
OPEN = 64  # shards that stay open
THREADS = 32  # that ask at once: a network file system answers each in about a millisecond


_open: dict[str, io.FileIO] = {}  # the last used one is the last


class Stamp(NamedTuple):
    """What changes when a shard does. size: bytes; time: of a file's change in ns, or a number for an address's tag."""

    size: int
    time: int


def is_pipe(place: str) -> bool:
    """Whether it is the output of a command."""
    return place.startswith(PIPE)


def is_local(place: str) -> bool:
    """Whether it is a file of this machine, mounted folders included."""
    return not is_pipe(place) and "://" not in place


def absolute(place: str) -> str:
    """The same place from any working folder."""
    return os.path.abspath(place) if is_local(place) else place


def read(place: str, offset: int, size: int, pauses: Sequence[float] | None = None) -> bytes:
    """The bytes [offset, offset + size) of a shard; fewer where it ends before.

    Raises OSError as the system does for a file; UserError for an address, Unreachable where several tries, with
    `pauses` between them, do not reach it.
    """
    if is_local(place) or is_pipe(place) or shard_cache.copy_of(place).exists():
        return _pread(place, offset, size, pauses)
    fs, path = file_system(place)
    content: bytes = patiently(place, lambda: fs.cat_file(path, start=offset, end=offset + size), pauses)
    if len(content) > size:  # a server without ranges sends all of it
        return _pread(place, offset, size, pauses)
    return content


def open_place(place: str) -> BinaryIO:
    """The whole shard as a file that can seek; of an address or a command, its copy."""
    return open(place, "rb") if is_local(place) else io.BufferedReader(shard_cache.opened(place))


def size(place: str) -> int:
    """Bytes of a shard."""
    if is_pipe(place):
        with shard_cache.opened(place) as file:
            return os.fstat(file.fileno()).st_size
    return stamp(place).size


def forget(place: str) -> None:
    """Delete the copy of a shard that is no file, if there is one: it may be of an older content."""
    if not is_local(place):
        shard_cache.copy_of(place).unlink(missing_ok=True)
        _open.clear()


def stamp(place: str) -> Stamp:
    """The stamp of a shard, which is not read; a command has none. FileNotFoundError for a file that is not there."""
    if is_local(place):
        found = os.stat(place)
        return Stamp(found.st_size, found.st_mtime_ns)
    if is_pipe(place):
        return Stamp(0, 0)
    fs, path = file_system(place)
    info = patiently(place, lambda: fs.info(path))
    marks = [str(info[mark]) for mark in ("ETag", "Content-MD5", "Last-Modified") if info.get(mark)]  # https
    tag = hashlib.sha256("\0".join([str(fs.ukey(path)), *marks]).encode()).hexdigest()
    return Stamp(int(info.get("size") or 0), int(tag[:15], 16))


def stamps(shards: Sequence[str], option: str = "") -> list[Stamp]:
    """The stamps of all shards, asked for by many threads. UserError, which names `option`, for a missing file."""

    def one(place: str) -> Stamp:
        try:
            return stamp(place)
        except OSError as error:
            what = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
            raise UserError(f"{option} {place}: {what}; was it moved or deleted?".lstrip()) from None

    return _together(one, shards)


def require_files(paths: Sequence[str], where: str, remedy: str) -> None:
    """UserError for the first path that is no file."""

    def there(path: str) -> bool:
        try:
            return stat.S_ISREG(os.stat(path).st_mode)
        except OSError:
            return False

    for path, found in zip(paths, _together(there, paths), strict=True):
        if not found:
            raise UserError(f"{where}: no such file: {path}; {remedy}.")


def listing(address: str) -> list[str]:
    """The addresses below a folder of an object store that end in .tar, in their order."""
    fs, path = file_system(address)
    names = patiently(address, lambda: fs.ls(path, detail=False))
    return sorted(fs.unstrip_protocol(name) for name in names if str(name).endswith(".tar"))


def _together(call: Callable[[str], _T], places: Sequence[str]) -> list[_T]:
    if len(places) < THREADS:
        return [call(place) for place in places]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(call, places))


def _pread(place: str, offset: int, size: int, pauses: Sequence[float] | None) -> bytes:
    try:
        file = _file(place, pauses)
        return os.pread(file.fileno(), size, offset)
    except OSError:  # such as ESTALE: the next try opens it again
        _open.clear()
        raise


def _file(place: str, pauses: Sequence[float] | None) -> io.FileIO:
    """The open shard; of others than files the open copy, which is made with these pauses between the tries."""
    file = _open.pop(place, None)
    if file is None:
        file = io.FileIO(place) if is_local(place) else shard_cache.opened(place, pauses)
        # Samples are read alone: the kernel would read twice as much ahead.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    elif not is_local(place):
        shard_cache.used(file)
    _open[place] = file
    for oldest in list(_open)[:-OPEN]:  # what falls out is closed when its last reader lets go of it
        _open.pop(oldest, None)
    return file
