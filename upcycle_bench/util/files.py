"""Files: written whole or not at all, their hashes, and whether a folder takes them.

    with atomic(path) as part:                # `part` stands beside `path`, for any writer
        save_file(state, part)                # then it is renamed to `path`; after a failure it is gone

Whoever sees a file at its final name sees all of it. Two processes may write the same file at once; the last one wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from upcycle_bench.util.environment import cores
from upcycle_bench.util.errors import UserError


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` that no other process uses; a file that still stands there at the end is removed.

    For a file whose final name is known only when it is written; else use `atomic`. The name ends in .tmp whatever
    `path` ends in, or a search for `*.json` would find a record that is half-written: tell the writer the format.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A `temporary` name to write to; renamed to `path` when the block ends, removed when it raises."""
    with temporary(path) as part:
        yield part
        os.replace(part, path)


def write_atomically(path: Path, data: bytes) -> None:
    """All of `data` at `path`, on the disk, or nothing."""
    with atomic(path) as part, part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


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
