"""test_same_view starts it on two ranks: one line of what `require_same_view` says, or "same".

usage: python -m tests.training.view_worker SHARDS
"""

import sys
from pathlib import Path

import torch.distributed as dist

from upcycle_bench.data.world import World
from upcycle_bench.training import same_view
from upcycle_bench.util.errors import UserError

if __name__ == "__main__":
    dist.init_process_group("gloo")
    same_view.LAG = 0.2
    shards = tuple(sorted(Path(sys.argv[1]).glob("*.tar")))
    try:
        same_view.require_same_view(World("local", shards, Path(), "the same identity"))
        print("same", flush=True)
    except UserError as error:
        print(error, flush=True)
    dist.destroy_process_group()
