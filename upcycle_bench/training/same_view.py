"""Every rank must see the cache and the data of rank 0: else it would train on other pairs, or lose checkpoints.

require_same_view(world)        # UserError on every rank, which names the host and the rank that sees others
"""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path
from typing import Any

from upcycle_bench.data.world import World
from upcycle_bench.util import distributed
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import UserError

LAG = 10.0  # seconds that a file may take to be seen on another node


def require_same_view(world: World) -> None:
    """UserError, the same on every rank, unless all ranks see rank 0's cache folder and its training data."""
    if distributed.world_size() == 1:
        return
    token = cache_root() / f".seen-{uuid.uuid4().hex[:12]}" if distributed.is_main() else None
    try:
        if token is not None:
            token.parent.mkdir(parents=True, exist_ok=True)
            token.touch()
        name, data = distributed.from_main((token and token.name, _data(world)))
        problem = _cache_problem(cache_root() / name) or _data_problem(world, data)
        problems = distributed.from_all(problem)
    finally:
        if token is not None:
            token.unlink(missing_ok=True)
    if first := next(filter(None, problems), None):
        raise UserError(first)


def _data(world: World) -> Any:
    """The identity of the training data, and names and sizes of the first and the last shard."""
    ends = [Path(shard) for shard in (*world.train_shards[:1], *world.train_shards[-1:])]
    return world.sha256, [(path.name, path.stat().st_size if path.is_file() else 0) for path in ends]


def _cache_problem(token: Path) -> str | None:
    end = time.monotonic() + LAG
    while not token.exists():
        if time.monotonic() > end:
            return (
                f"{_here()} does not see rank 0's cache (its own is {token.parent}): set UPCYCLE_BENCH_CACHE to a "
                "folder that all nodes share."
            )
        time.sleep(0.1)
    return None


def _data_problem(world: World, data: Any) -> str | None:
    if _data(world) == data:
        return None
    folder = Path(world.train_shards[0]).parent
    return (
        f"{_here()} sees other training data than rank 0 in {folder}: give {world.option or 'UPCYCLE_BENCH_CACHE'} a "
        "folder that all nodes share."
    )


def _here() -> str:
    return f"rank {distributed.rank()} on {socket.gethostname()}"
