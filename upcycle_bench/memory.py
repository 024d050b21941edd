"""Memory of a long computation on a CPU: freed pieces are kept for the next step.

glibc returns large pieces to the kernel as soon as they are freed; each step would fetch them again, page by
page: about 5 % of a training step of the lab on two cores.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """From now on pieces below 1 GiB stay with this process once they are freed; False where there is no glibc.

    What a process takes at most does not grow by it but for 64 MiB; what it takes afterwards stays there.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    limits = ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 1 << 26))
    return all(mallopt(name, value) == 1 for name, value in limits)
