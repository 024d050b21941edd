"""GPUs between commands: one that is taken is passed over, and shared only where none is free."""

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from upcycle_bench.util.gpu_locks import GpuLocks

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path))


def test_each_place_has_its_own_and_too_many_share() -> None:
    gpus = GpuLocks(["2", "GPU-8f"])
    assert [gpus.take(place) for place in range(3)] == ["2", "GPU-8f", "2"]
    gpus.release(0)  # another is still on it
    assert not GpuLocks(["2"]).take_own(0)
    assert gpus.take(0) == "2"
    for place in (2, 1):
        gpus.release(place)
    assert gpus.take(2) == "GPU-8f"
    gpus.close()
    assert GpuLocks(["2"]).take_own(0)


def test_two_commands_take_different_ones() -> None:
    one, other = GpuLocks(["0", "1", "2"]), GpuLocks(["0", "1", "2"])
    assert (one.take(0), other.take(0), other.take(1)) == ("0", "1", "2")
    assert not one.take_own(1) and not one.take_own(3)
    assert other.take(2) == "0" and one.take(1) == "1"  # none is free: one on which no other run of ours is
    one.close()
    third = GpuLocks(["0", "1", "2"])
    assert third.take_own(0) and not third.take_own(1) and not third.take_own(2)


def test_another_machine_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have the same cache."""
    here = GpuLocks(["0"])
    monkeypatch.setattr(socket, "gethostname", lambda: "far-away")
    assert here.take_own(0) and GpuLocks(["0"]).take_own(0)


def test_a_machine_without_gpus() -> None:
    gpus = GpuLocks([])
    assert len(gpus) == 0 and gpus.take(3) is None and not gpus.take_own(0)
    gpus.release(3)
    gpus.close()


def use(held: Any) -> None:
    gpus = GpuLocks(["0", "1"])
    assert gpus.take(0) == "0"
    held.set()
    time.sleep(60)


def test_a_command_that_was_killed_uses_nothing() -> None:
    held = FORK.Event()
    process = FORK.Process(target=use, args=(held,))
    process.start()
    assert held.wait(timeout=30) and process.pid is not None
    gpus = GpuLocks(["0", "1"])
    assert gpus.take(0) == "1"
    gpus.release(0)
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=30)
    assert gpus.take(0) == "0"
