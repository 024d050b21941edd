"""What this process may use: cores, memory, GPUs. A container or a batch job may have less than the machine.

    usable_cores()          # 4.0: of the affinity, and of the quota of the control groups
    free_memory()           # bytes: what the machine has free, and what the control groups still allow
    visible_gpus()          # ["0", "1"], as CUDA_VISIBLE_DEVICES writes them

Control groups of version 2 and 1 are read, from this process's own up to the root.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from upcycle_bench.util.environment import cores


def usable_cores(root: Path = Path("/")) -> float:
    """Cores; a quota may give parts of one."""
    return min([float(cores()), *_quotas(root)])


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping; caches of files count as free."""
    kibibytes = _fields(root / "proc/meminfo").get("MemAvailable:")
    elsewhere = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # than on Linux
    return max(0, min([elsewhere if kibibytes is None else kibibytes * 1024, *_allowances(root)]))


def visible_gpus() -> list[str]:
    """The GPUs of this process, by CUDA's own rule: a list ends at the first entry that is none."""
    if (names := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        given = (name.strip() for name in names.split(","))
        return [*itertools.takewhile(lambda name: name and not name.startswith("-"), given)]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _quotas(root: Path) -> Iterator[float]:
    for group in _groups(root, "", "cpu"):
        with contextlib.suppress(OSError, ValueError):  # no limit is written as `max`
            quota, period = (group / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        with contextlib.suppress(OSError, ValueError):
            quota_us = int((group / "cpu.cfs_quota_us").read_text())
            if quota_us > 0:
                yield quota_us / int((group / "cpu.cfs_period_us").read_text())


def _allowances(root: Path) -> Iterator[int]:
    """What each control group lets its processes still take; its cache of files can be given up."""
    for group in _groups(root, "", "memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError):
                most, now = int((group / limit).read_text()), int((group / used).read_text())
                yield most - now + _fields(group / "memory.stat").get(cache, 0)


def _groups(root: Path, *controllers: str) -> Iterator[Path]:
    """The folders of this process's control groups, up to the root; version 2 has no name of a controller."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        for name in set(controllers) & set(names.split(",")):
            top = root / "sys/fs/cgroup" / name
            group = top / path.lstrip("/")
            yield from (each for each in (group, *group.parents) if each == top or top in each.parents)


def _fields(file: Path) -> dict[str, int]:
    """The numbers of a file with lines `name number ...`; none where it cannot be read."""
    try:
        parts = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {part[0]: int(part[1]) for part in parts if len(part) > 1 and part[1].isdigit()}
