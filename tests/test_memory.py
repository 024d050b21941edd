"""Freed memory stays with the process: after some rounds large pieces cost no page fault."""

import json
import subprocess
import sys

import pytest

CHILD = """
import json, resource, sys
import torch
from upcycle_bench.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [torch.zeros(1 << 24) for _ in range(2)]  # 64 MiB each
    del pieces
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([kept, faults]))
"""


def faults_of(how: str) -> tuple[bool | None, list[int]]:
    done = subprocess.run([sys.executable, "-c", CHILD, how], check=True, capture_output=True, text=True)
    kept, faults = json.loads(done.stdout)
    return kept, faults


def test_later_pieces_are_where_earlier_ones_were() -> None:
    kept, faults = faults_of("keep")
    if not kept:
        pytest.skip("no glibc here")
    _, usual = faults_of("usual")
    assert min(usual) > 10_000  # so the figure below says something
    assert sum(faults[10:]) < sum(usual[10:]) / 4  # places settle after a few rounds
