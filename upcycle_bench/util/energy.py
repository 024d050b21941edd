"""The energy that a rank's device has drawn, where the device counts it.

    counter = EnergyCounter(torch.device("cuda", 0))
    counter.joules()                # since it was made; None where nothing is reported

Of a training on GPUs it is that of the ranks' GPUs by NVML, which needs the package nvidia-ml-py; of one on CPUs, that
of each machine's CPU packages by RAPL, whose files are for root alone on most machines. Whatever else runs on the
device is in it; a GPU's host, memory and cooling are not. A counter that fails or goes back is given up: half a sum is
none.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")

Reading = Callable[[], list[tuple[float, float]]]  # of each counter its joules, and those at which it begins again


class EnergyCounter:
    """Joules of this rank's device since now."""

    def __init__(self, device: torch.device) -> None:
        self._read = _gpu(device) if device.type == "cuda" else _packages()
        self._last = self._read() if self._read else []
        self._total = 0.0

    def joules(self) -> float | None:
        """None where the device does not report it; 0 on a rank whose machine another rank reads."""
        if self._read is None:
            return None
        try:
            now = self._read()
            drawn = [
                joules - before if joules >= before else joules - before + wraps_at
                for (joules, wraps_at), (before, _) in zip(now, self._last, strict=True)
            ]
        except Exception:  # a driver may raise anything, and a training must not end by it
            drawn = [-1.0]
        if any(each < 0 for each in drawn):
            self._read = None
            return None
        self._last, self._total = now, self._total + sum(drawn)
        return self._total


def _gpu(device: torch.device) -> Reading | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (pynvml.NVMLError, AttributeError):  # a GPU that does not count, a part of one; a torch without UUIDs
        return None
    return lambda: [(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)]


def _packages() -> Reading | None:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return lambda: []
    try:  # AMD's counters have Intel's name
        packages = [
            (domain / "energy_uj", float((domain / "max_energy_range_uj").read_text()) / 1e6)
            for domain in sorted(POWERCAP.glob("intel-rapl:*"))
            if (domain / "name").read_text().startswith("package")
        ]
        read = lambda: [(float(counter.read_text()) / 1e6, most) for counter, most in packages]  # noqa: E731
        read()
    except (OSError, ValueError):
        return None
    return read if packages else None
