"""The least time that a piece of work can take here: its FLOPs and bytes over rates measured in the same run.

seconds = floor(step, "bf16", settings, parameters=8_000_000)
"""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import torch

from tests.bench.rows import Settings
from tests.bench.timing import Step, clock
from upcycle_bench.util.flops import FlopCounter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
ADAMW_BYTES = 28  # of each float32 parameter: weight, gradient and two moments read; weight and moments written


class Rates(NamedTuple):
    """Matrix products in FLOP/s by precision, and memory traffic in bytes/s: the best of some tries."""

    flops: dict[str, float]
    bandwidth: float


def measure_rates(settings: Settings) -> Rates:
    """Of products as an FFN of ViT-B makes them (4,096 x 768 by 768 x 3,072), and of copying 256 MiB."""
    return _rates(settings.threads, settings.device)


@functools.cache
def _rates(threads: int, device: torch.device) -> Rates:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    flops = {}
    for precision, dtype in DTYPES.items():
        left, right = (torch.randn(shape, device=device).to(dtype) for shape in ((4096, 768), (768, 3072)))
        product = functools.partial(torch.matmul, left, right)
        flops[precision] = 2 * 4096 * 768 * 3072 / _best(product, device)
    source = torch.zeros(1 << 26, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source), device)
    torch.set_num_threads(before)
    return Rates(flops, bandwidth)


def _best(step: Step, device: torch.device, seconds: float = 0.7) -> float:
    clock(step, 1, device)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, clock(step, 1, device).wall)
    return best


def floor(step: Step, precision: str, settings: Settings, parameters: int = 0) -> float:
    """Seconds of `step`'s matrix products, and of AdamW passing once over so many parameters. Calls `step` once."""
    rates = measure_rates(settings)
    with FlopCounter() as counter:
        step()
    return counter.get_total_flops() / rates.flops[precision] + ADAMW_BYTES * parameters / rates.bandwidth
