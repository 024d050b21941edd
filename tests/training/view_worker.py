"""test_same_view starts it on two ranks: what `require_same_view` says of each case, a line each; or "same".

usage: python -m tests.training.view_worker CACHE:SHARDS ...        (of this rank; SHARDS is a folder)
"""

import os
import sys
from pathlib import Path

import torch.distributed as dist

from upcycle_bench.data.world import World
from upcycle_bench.training import same_view
from upcycle_bench.util.errors import UserError

if __name__ == "__main__":
    dist.init_process_group("gloo")
    same_view.LAG = 0.2
    for case in sys.argv[1:]:
        os.environ["UPCYCLE_BENCH_CACHE"], shards = case.split(":")
        try:
            same_view.require_same_view(World("local", tuple(Path(shards).glob("*.tar")), Path(), "the same identity"))
            print("same", flush=True)
        except UserError as error:
            print(error, flush=True)
    dist.destroy_process_group()
