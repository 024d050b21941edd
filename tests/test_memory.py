"""Freed memory stays with the process (after some rounds large pieces cost no page fault) until it is returned."""

import json
import platform
import subprocess
import sys

import pytest

CHILD = """
import json, resource, sys
import torch
from upcycle_bench.memory import keep_freed_memory, return_freed_memory

def resident():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * resource.getpagesize()

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [torch.zeros(1 << 24) for _ in range(2)]  # 64 MiB each
    del pieces
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
held = torch.zeros(1 << 10)  # what stands behind the freed pieces must not hold them
before = resident()
return_freed_memory()
print(json.dumps([kept, faults, before - resident()]))
"""


def run(how: str) -> tuple[bool | None, list[int], int]:
    """Whether memory was kept, page faults of each round, and bytes that were returned at the end."""
    done = subprocess.run([sys.executable, "-c", CHILD, how], check=True, capture_output=True, text=True)
    kept, faults, returned = json.loads(done.stdout)
    return kept, faults, returned


def test_later_pieces_are_where_earlier_ones_were() -> None:
    kept, faults, returned = run("keep")
    if not kept or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 35):
        pytest.skip("no glibc that keeps pieces of this size")
    _, usual, _ = run("usual")
    assert min(usual) > 10_000  # so the figure below says something
    assert sum(faults[10:]) < sum(usual[10:]) / 4  # places settle after a few rounds
    assert returned > 100 << 20
