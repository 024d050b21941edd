"""Cores, memory and GPUs of this process: affinity, and control groups of both versions as Linux writes them."""

from pathlib import Path

import pytest

from upcycle_bench.util import capacity
from upcycle_bench.util.capacity import free_memory, usable_cores, visible_gpus

GB = 10**9


def write(root: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "cores", lambda: 8)


MEMORY = "MemTotal:       65000000 kB\nMemFree:         1000000 kB\nMemAvailable:   40000000 kB\n"


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == 8
    assert free_memory(write(tmp_path, {"proc/meminfo": MEMORY})) == 40_000_000 * 1024


def test_version_2_of_this_group_and_those_above(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/slurm/job_7"
    root = write(
        tmp_path,
        {
            "proc/meminfo": MEMORY,
            "proc/self/cgroup": "0::/slurm/job_7\n",
            f"{group}/cpu.max": "250000 100000\n",
            f"{group}/memory.max": "max\n",
            f"{group}/memory.current": str(9 * GB),
            "sys/fs/cgroup/slurm/cpu.max": "max 100000\n",
            "sys/fs/cgroup/slurm/memory.max": str(16 * GB),
            "sys/fs/cgroup/slurm/memory.current": str(10 * GB),
            "sys/fs/cgroup/slurm/memory.stat": f"anon 5\nactive_file {GB}\ninactive_file {3 * GB}\n",
        },
    )
    assert usable_cores(root) == 2.5
    assert free_memory(root) == 9 * GB  # 16 - 10, and 3 of its cache of files


def test_version_1_in_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/meminfo": MEMORY,
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/\n0::/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 * GB),
            "sys/fs/cgroup/memory/memory.stat": "cache 5\ntotal_inactive_file 4\n",
        },
    )
    assert usable_cores(root) == 3
    assert free_memory(root) == 0  # never negative


def test_no_limit_of_version_1(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/meminfo": MEMORY,
            "proc/self/cgroup": "5:cpu:/\n4:memory:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 * GB),
        },
    )
    assert (usable_cores(root), free_memory(root)) == (8, 40_000_000 * 1024)


def test_this_machine() -> None:
    assert usable_cores() > 0 and free_memory() > 0


@pytest.mark.parametrize(
    ("value", "found"),
    [("", []), ("2", ["2"]), ("0, 3", ["0", "3"]), ("1,-1,2", ["1"]), ("GPU-8f,MIG-1", ["GPU-8f", "MIG-1"])],
)
def test_visible_gpus_by_cudas_rule(monkeypatch: pytest.MonkeyPatch, value: str, found: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_gpus() == found


def test_gpus_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert visible_gpus() == ["0", "1"]
