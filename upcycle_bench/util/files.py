"""Files that are written whole or not at all, hashes of files, and a test whether a folder can be written.

    with atomic(path) as part:                # `part` is a path beside `path`, for any writer
        save_file(state, part)                # at the end it is renamed to `path`; after an error it is deleted

A file at its final name is complete. Two processes may write the same file at once; the last one wins.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from upcycle_bench.util.environment import cores
from upcycle_bench.util.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
LEAST = 1 << 16  # bytes: with less the disk is full


@contextlib.contextmanager
def full_disk_said(path: Path) -> Iterator[None]:
    """UserError where the block cannot write `path` since its disk is full; other errors pass.

    Writers raise many kinds of errors then: safetensors' says it in its text, torch.save's and np.save's not at all.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not (disk_is_full(error) or _free(path) < LEAST):
            raise
        raise UserError(
            f"{path}: no space is left on its disk; free some, or choose another folder (that of the cache is "
            "UPCYCLE_BENCH_CACHE)."
        ) from None


def disk_is_full(error: BaseException) -> bool:
    """Whether the error says that a disk or a quota is full."""
    return getattr(error, "errno", None) in FULL or any(os.strerror(number) in str(error) for number in FULL)


def _free(path: Path) -> int:
    """Bytes that are free on the disk of `path`, which need not exist."""
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(parent).free


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` that no other process uses; a file that is still there at the end is deleted.

    For a file whose final name is known only once it is written; otherwise use `atomic`. The name ends in .tmp, so that
    a search for `*.json` finds no half-written record. Writers that guess the format from the name must be told it.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with full_disk_said(path):
            yield part
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A `temporary` path to write to; it is renamed to `path` when the block ends, deleted when the block raises."""
    with temporary(path) as part:
        yield part
        publish(part, path)


def publish(part: Path, path: Path) -> None:
    """Rename `part` to `path`, with the mode of a file made as usual: safetensors makes its files private."""
    with temporary(path) as usual:
        usual.touch()
        part.chmod(usual.stat().st_mode)
    os.replace(part, path)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` and wait for the disk; after an error `path` is what it was before."""
    with atomic(path) as part, part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def require_ordinary(path: Path) -> None:
    """UserError for a folder or a device: a file that is written whole would take the place of /dev/null, too."""
    try:
        special = path.exists() and not path.is_file()
    except OSError as error:  # a name that is too long
        raise UserError(f"{path}: cannot be written ({error.strerror or error}).") from None
    if special:
        what = "a folder" if path.is_dir() else "no ordinary file"
        raise UserError(f"{path} is {what}: give the name of a file to write.")


def require_writable(folder: Path, option: str) -> None:
    """Raise UserError unless `folder`, or else the nearest folder above it that exists, can be written."""
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    try:  # os.access would allow root everything, even on a file system that cannot be written, such as /proc
        tempfile.TemporaryFile(dir=parent).close()
    except OSError:
        raise UserError(f"{option} {folder}: {parent} is not a folder that can be written; choose another.") from None


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, in hex digits."""
    return file_hash(path, "sha256").hexdigest()


def file_hash(path: Path, algorithm: str) -> Any:
    """hashlib's object of that algorithm, updated with a file's content; large files are read in pieces."""
    found = hashlib.new(algorithm)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found


def files_sha256(paths: Iterable[Path]) -> list[str]:
    """`file_sha256` of each path, by one thread a core: reading and hashing release the interpreter's lock."""
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(file_sha256, paths))
