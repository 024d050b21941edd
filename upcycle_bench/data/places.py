"""Where shards lie: files, until other places are known.

read("/data/000.tar", offset=1024, size=25_000)       # these bytes; fewer where the shard ends
"""

from __future__ import annotations

import io
import os
from functools import lru_cache


def read(place: str, offset: int, size: int) -> bytes:
    """The bytes [offset, offset + size) of a shard; fewer where it ends before. Raises OSError as the system does."""
    try:
        return os.pread(_file(place).fileno(), size, offset)
    except OSError:  # such as ESTALE: the next try opens it again
        _file.cache_clear()
        raise


@lru_cache(maxsize=64)
def _file(path: str) -> io.FileIO:
    file = io.FileIO(path)
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # the kernel would read twice as much ahead
    return file
