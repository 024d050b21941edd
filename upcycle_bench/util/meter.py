"""Seconds, FLOPs and peak memory of the phases of a run.

meter = Meter(device)
with meter.phase("train", count=True): ...
meter.phases["train"].seconds
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from upcycle_bench.util.flops import counted_flops


@dataclass
class Phase:
    """The cost of one phase. `flops` is None where they are not counted; `peak_memory_bytes` as in `peak_memory`.

    `samples` are the training pairs that it sent through a model, `steps` its optimiser steps, `joules` the energy of
    its devices (None: not reported); its user sets them.
    """

    seconds: float = 0.0
    flops: int | None = None
    peak_memory_bytes: int = 0
    samples: int = 0
    steps: int = 0
    joules: float | None = None


@dataclass
class Meter:
    """Measures phases on `device`, and keeps them by name."""

    device: torch.device
    phases: dict[str, Phase] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str, count: bool = False) -> Iterator[Phase]:
        """Measure the block; it gets the `Phase`, which is complete at its end. `count` counts FLOPs."""
        phase = self.phases[name] = Phase()
        counter: Any = counted_flops() if count else contextlib.nullcontext()
        flops = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        try:
            with counter as flops:
                yield phase
        finally:
            phase.seconds = time.perf_counter() - began
            if flops is not None:
                phase.flops = flops.get_total_flops()
            phase.peak_memory_bytes = peak_memory(self.device)


def peak_memory(device: torch.device) -> int:
    """The most memory in use at once, in bytes: on CUDA of the device since its reset, elsewhere of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return high_water(Path("/proc/self/status"))


def high_water(status: Path) -> int:
    """The most memory of this process in bytes: from Linux's `/proc/self/status`, elsewhere from getrusage.

    On Linux, getrusage would also count the memory of the parent at the time of the fork, and cannot be reset.
    """
    with contextlib.suppress(OSError):
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS gives bytes, others KiB


def forget_peak_memory() -> None:
    """Reset the high-water mark on Linux, so that the peak of an earlier run does not count for the next."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
