"""Ranks that see another cache or other data than rank 0 are named in one line, on every rank."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def seen(caches: list[Path], shards: list[Path]) -> list[str]:
    """What each of two ranks says, by their caches and folders of shards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(2):
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **variables, "UPCYCLE_BENCH_CACHE": str(caches[rank])}
        command = [sys.executable, "-m", "tests.training.view_worker", str(shards[rank])]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT))
    return [process.communicate(timeout=120)[0].strip() for process in processes]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    for number, size in enumerate((3, 4)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "0000.tar").write_bytes(b"x" * size)
    return [tmp_path / "0", tmp_path / "1"]


@pytest.mark.parametrize(
    ("caches", "shards", "expected"),
    [
        ((0, 0), (0, 0), "same"),
        ((0, 1), (0, 0), "rank 1 on {host} does not see rank 0's cache (its own is {1}): set UPCYCLE_BENCH_CACHE to a"),
        ((0, 0), (0, 1), "rank 1 on {host} sees other training data than rank 0 in {1}: give --data a folder"),
    ],
)
def test_two_ranks(folders: list[Path], caches: tuple[int, int], shards: tuple[int, int], expected: str) -> None:
    said = seen([folders[number] for number in caches], [folders[number] for number in shards])
    assert said[0] == said[1]
    assert said[0].startswith(expected.format(*folders, host=socket.gethostname()))
    assert not list(folders[0].glob(".seen*"))
