"""What a training on a CPU keeps for its next step: freed blocks of memory and compiled kernels.

By default glibc returns a large block to the operating system as soon as it is freed. The next step must then fetch the
memory again, page by page, which is 5 to 10 % of a training step of the lab. Kept blocks become scattered, and over
hundreds of steps the process would grow by a quarter. So free memory is returned at every checkpoint.

oneDNN computes products in bf16. It compiles one kernel for each shape, which takes 0.5 to 1 ms, and keeps the last
1,024 kernels. The numbers of rows of captions and of experts change at every step, so a training of the lab needs some
thousands of kernels again and again. If all of them are kept, a step takes 3 to 6 % less time.
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
    """From now on this process keeps freed blocks of up to 1 GiB; False where there is no glibc.

    Older versions of glibc refuse a bound above 32 MiB; there the bound is 32 MiB.
    """
    if (libc := _glibc()) is None:
        return False
    kept = [libc.mallopt(_MMAP_THRESHOLD, size) == 1 for size in (1 << 25, 1 << 30)]
    rest = [libc.mallopt(name, value) == 1 for name, value in ((_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 1 << 26))]
    return any(kept) and all(rest)


def return_freed_memory() -> None:
    """Return all memory that is free now to the operating system."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def keep_compiled_kernels() -> None:
    """Let oneDNN keep 16,384 kernels, unless the environment sets a number; call it before the first kernel."""
    if not any(name in os.environ for name in _KERNELS):
        os.environ[_KERNELS[0]] = str(1 << 14)


@functools.cache
def _glibc() -> Any:
    """The C library if it is glibc, else None: musl and others have no such settings."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
