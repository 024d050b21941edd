"""What a phase costs: seconds, FLOPs and peak memory, measured while it runs."""

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
    """One phase's cost; peak memory is the process's high-water mark (on a GPU, the device's) by the phase's end."""

    seconds: float = 0.0
    flops: int | None = None
    peak_memory_bytes: int = 0


@dataclass
class Meter:
    """Collects phases: `with meter.phase("train") as phase: ...`; FLOPs are counted with `count=True`."""

    device: torch.device
    phases: dict[str, Phase] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str, count: bool = False) -> Iterator[Phase]:
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
    """High-water mark in bytes: of the device's memory on CUDA, of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return high_water(Path("/proc/self/status"))


def high_water(status: Path) -> int:
    """This program's most memory in bytes, by Linux's status file, else by getrusage.

    The latter begins with what the process held before it became this program, which a large parent makes much, and
    nothing makes it less (`forget_peak_memory`).
    """
    with contextlib.suppress(OSError):
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # bytes there, KiB elsewhere


def forget_peak_memory() -> None:
    """Let Linux begin a new high-water mark: a run's peak must not be that of the run before."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
