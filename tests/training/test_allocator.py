"""What a training keeps for its next step: freed memory, which then costs no page faults, and compiled kernels."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

CHILD = """
import json, resource, sys
import torch
from upcycle_bench.training.allocator import keep_freed_memory, return_freed_memory

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
held = torch.zeros(1 << 10)  # a block behind the freed ones must not prevent their return
before = resident()
return_freed_memory()
print(json.dumps([kept, faults, before - resident()]))
"""


def run(how: str) -> tuple[bool | None, list[int], int]:
    """Whether glibc took the settings, page faults of each round, and bytes returned at the end."""
    done = subprocess.run([sys.executable, "-c", CHILD, how], check=True, capture_output=True, text=True)
    kept, faults, returned = json.loads(done.stdout)
    return kept, faults, returned


def test_freed_memory_is_used_again() -> None:
    kept, faults, returned = run("keep")
    if not kept or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 35):
        pytest.skip("no glibc that keeps blocks of this size")
    _, usual, _ = run("usual")
    assert min(usual) > 10_000  # without the settings, there are many faults to save
    assert sum(faults[10:]) < sum(usual[10:]) / 4  # the first rounds still get new memory
    assert returned > 100 << 20


PRODUCTS = """
import sys
import torch
from upcycle_bench.training.session import open_session

with open_session(1):
    weight = torch.zeros(16, 16, dtype=torch.bfloat16)
    for rows in [*range(100, 100 + int(sys.argv[1]))] * 2:  # torch computes smaller products itself
        torch.zeros(rows, 16, dtype=torch.bfloat16) @ weight
"""


def kernels_compiled(shapes: int, **variables: str) -> int:
    """How many kernels a training session compiles for products of that many shapes, each computed twice."""
    environment = {name: value for name, value in os.environ.items() if "PRIMITIVE_CACHE" not in name}
    environment |= {"ONEDNN_VERBOSE": "profile_create", "CUDA_VISIBLE_DEVICES": "", **variables}
    command = [sys.executable, "-c", PRODUCTS, str(shapes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return sum("create:cache_miss" in line and "matmul" in line for line in done.stdout.splitlines())


@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="bf16 products are not oneDNN's on this processor",
)
def test_a_session_compiles_a_product_once_for_a_shape() -> None:
    assert kernels_compiled(1100) == 1100
    # The environment wins: with oneDNN's default, and with less, which takes fewer shapes to show.
    assert kernels_compiled(1100, ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024") == 2 * 1100
    assert kernels_compiled(40, DNNL_PRIMITIVE_CACHE_CAPACITY="16") == 2 * 40
