"""Ranks that see another cache or other data than rank 0 are named in one line, on every rank."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# For each case, which folder is the cache of the two ranks, and which has their shards.
CASES = [((0, 0), (0, 0)), ((0, 1), (0, 0)), ((0, 0), (0, 1))]


def test_two_ranks(tmp_path: Path) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder, size in zip(folders, (3, 4), strict=True):
        folder.mkdir()
        (folder / "0000.tar").write_bytes(b"x" * size)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(2):
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        cases = [f"{folders[caches[rank]]}:{folders[shards[rank]]}" for caches, shards in CASES]
        command = [sys.executable, "-m", "tests.training.view_worker", *cases]
        environment = {**os.environ, **variables}
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT))
    said = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert said[0] == said[1]
    host = socket.gethostname()
    assert said[0] == [
        "same",
        f"rank 1 on {host} does not see rank 0's cache (its own is {folders[1]}): set UPCYCLE_BENCH_CACHE to a folder "
        "that all nodes share.",
        f"rank 1 on {host} sees other training data than rank 0 in {folders[1]}: give --data a folder that all nodes "
        "share.",
    ]
    assert not list(folders[0].glob(".seen*"))
