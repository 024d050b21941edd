"""A training session: the device, the process group and the CPU threads, which DeepSpeed's engine needs.

    with session.open_session(threads=2) as device: ...

A single process, also one that a launcher started, uses an in-memory store and opens no port.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist

from upcycle_bench.model import backends
from upcycle_bench.training.allocator import keep_compiled_kernels, keep_freed_memory
from upcycle_bench.util import distributed
from upcycle_bench.util.distributed import choose_device
from upcycle_bench.util.first_cause import last_word, watching
from upcycle_bench.util.plain import plain
from upcycle_bench.util.rendezvous import meet, require_sound


@contextlib.contextmanager
def open_session(threads: int, trains: bool = True) -> Iterator[torch.device]:
    """Start a process group and set `threads` CPU threads, shared by this machine's processes; undo both at the end.

    Yields this rank's device. Raises UserError for an unknown backend of the experts, a rank without a GPU, processes
    that do not meet (`util.rendezvous`), and, where it `trains`, without DeepSpeed.
    """
    from upcycle_bench.model.deepspeed_import import deepspeed, require_deepspeed

    if trains:
        require_deepspeed()
    backends.forced()  # it raises for an unknown name, before anything is started
    off = plain()  # and another wrong value
    device = choose_device()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    if device.type == "cpu" and not off:
        keep_freed_memory()
        keep_compiled_kernels()
    started = not dist.is_initialized()
    before = torch.get_num_threads()
    with _group("nccl" if device.type == "cuda" else "gloo") if started else contextlib.nullcontext():
        torch.set_num_threads(max(1, threads // distributed.local_world_size()))
        try:
            if deepspeed is not None:
                with contextlib.redirect_stdout(sys.stderr):
                    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
            yield device
        finally:
            torch.set_num_threads(before)
            if started and deepspeed is not None:
                _forget_groups()


@contextlib.contextmanager
def _group(backend: str) -> Iterator[None]:
    """The process group of this process and those that were started with it. UserError where they do not meet.

    A rank on which another's failure ends the block gets PeerFailed.
    """
    require_sound()
    world = distributed.world_size()
    os.environ.setdefault("LOCAL_RANK", "0")  # deepspeed.initialize insists on it
    store = meet() if world > 1 else dist.HashStore()
    store.set_timeout(distributed.PATIENCE)
    rank = distributed.rank()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=distributed.PATIENCE)
    with watching(store, rank, world) if world > 1 else contextlib.nullcontext():
        try:
            with last_word():  # told before the group is destroyed, which the others notice
                yield
        finally:
            dist.destroy_process_group()


def _forget_groups() -> None:
    """Clear the process groups and the backend that DeepSpeed keeps in module globals: they are no longer valid."""
    import deepspeed.comm.comm as comm
    from deepspeed.utils import groups

    comm.cdb = None
    for name in vars(groups):
        if name.startswith("_") and name.isupper() and "GROUP" in name:
            value = getattr(groups, name)
            setattr(groups, name, {} if isinstance(value, dict) else None)
