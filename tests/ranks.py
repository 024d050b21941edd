"""Starts the ranks of a command as a scheduler does; torchrun would import torch once more, and end with 1 always.

stdout = launch(2, "-m", "upcycle_bench", "run", "-s", "dense", "-p", "smoke", "--json")
processes = start(2, sys.executable, "-m", "upcycle_bench", ...)
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

ROOT = Path(__file__).parents[1]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def variables(ranks: int) -> list[dict[str, str]]:
    """What torchrun sets for each of these ranks; nothing for one."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    among = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), **where}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **among} for rank in range(ranks)]


def start(ranks: int, *words: str, **how: Any) -> list[subprocess.Popen[str]]:
    """One process of this command for each rank, with one thread, from the root of the repository."""
    environments = [{**os.environ, "OMP_NUM_THREADS": "1", **own} for own in variables(ranks)]
    return [subprocess.Popen(words, env=environment, cwd=ROOT, text=True, **how) for environment in environments]


def launch(ranks: int, *arguments: str) -> str:
    """Run Python with these arguments on so many ranks, which must succeed; returns what rank 0 printed."""
    with TemporaryFile("w+") as said:
        processes = start(ranks, sys.executable, *arguments, stdout=subprocess.PIPE, stderr=said)
        try:
            printed = [process.communicate(timeout=300)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        said.seek(0)
        assert not any(process.returncode for process in processes), said.read()[-8000:]
    assert not any(printed[1:]), "another rank than 0 has printed"
    return printed[0]
