"""What a long computation on a CPU keeps for its next step: freed pieces of memory, compiled kernels.

glibc returns large pieces to the kernel as soon as they are freed; each step would fetch them again, page by page: 5 to
10 % of a training step of the lab. Kept pieces scatter, though, and over hundreds of steps a process would grow by a
quarter: so they are returned now and then, where a checkpoint is written.

oneDNN, which computes products in bf16, compiles a kernel for every shape, 0.5 to 1 ms each, and keeps the last 1,024.
Captions and experts have other numbers of rows at each step, so a training of the lab needs some thousands, again and
again: with room for all of them its steps take 3 to 6 % less time.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Any

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")  # the second is the older name


def keep_freed_memory() -> bool:
    """From now on pieces below 1 GiB stay with this process once they are freed; False where there is no glibc.

    Older ones refuse more than 32 MiB, which is then the bound.
    """
    if (libc := _glibc()) is None:
        return False
    kept = [libc.mallopt(_MMAP_THRESHOLD, size) == 1 for size in (1 << 25, 1 << 30)]
    rest = [libc.mallopt(name, value) == 1 for name, value in ((_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 1 << 26))]
    return any(kept) and all(rest)


def return_freed_memory() -> None:
    """Give back what is free now, wherever it stands."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def keep_compiled_kernels() -> None:
    """Room for 16,384 of them in oneDNN, unless the environment says how many; it asks once, at its first kernel."""
    if not any(name in os.environ for name in _KERNELS):
        os.environ[_KERNELS[0]] = str(1 << 14)


@functools.cache
def _glibc() -> Any:
    """The C library, if it is glibc: musl and others have no such settings."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
