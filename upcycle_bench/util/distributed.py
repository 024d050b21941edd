"""Ranks and collectives: the same calls work with one process and with many.

One process needs no launcher. `torchrun` starts several, and sets RANK, WORLD_SIZE and LOCAL_RANK.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from upcycle_bench.util.errors import UserError


def rank() -> int:
    """This process's rank, from 0. torchrun's variable tells it before the process group exists."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes take part, on all machines."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on the rank that writes and prints."""
    return rank() == 0


def from_main(value: Any) -> Any:
    """Rank 0's value (any picklable object), on every rank."""
    if not dist.is_initialized() or world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def send_from_main(module: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers, in place."""
    if dist.is_initialized() and world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def gather(local: Tensor) -> Tensor:
    """The tensors of all ranks, which have one shape, concatenated along the first dimension, on every rank."""
    if not dist.is_initialized() or world_size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized() and world_size() > 1:
        dist.barrier()


def sum_over_ranks(value: int) -> int:
    """The sum of a count over all ranks."""
    if not dist.is_initialized() or world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(value, device=device)
    dist.all_reduce(total)
    return int(total)


def mean_weight(local_count: int) -> float:
    """A factor for a sum over this rank's items: the mean of the products over ranks is the mean over all items."""
    return world_size() / max(1, sum_over_ranks(local_count))  # without any item the sum is 0, whatever the factor


def own_connection(store: dist.Store) -> dist.Store:
    """The same store by a connection of its own, for a thread: on a shared one it waits behind every other wait."""
    if hasattr(store, "clone"):
        return store.clone()
    if isinstance(store, dist.PrefixStore):  # before torch 2.8, which tells no prefix: one for each start by torchrun
        again = own_connection(store.underlying_store)
        return dist.PrefixStore(f"thread {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", again)
    assert isinstance(store, dist.TCPStore)
    return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)


def choose_device() -> torch.device:
    """This rank's CUDA device, or the CPU on a machine without CUDA; UserError for more processes than GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpus:
        raise UserError(
            f"process {local_rank} of this machine has no GPU, there are {gpus}: lower --nproc_per_node, "
            "or let srun give each task all GPUs of its node (--gpus-per-node)."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def check_world(batch_size: int, ep_size: int) -> None:
    """Raise UserError unless the ranks can share a batch of `batch_size` pairs and form groups of `ep_size` ranks."""
    world = world_size()
    if batch_size % world:
        raise UserError(f"batch_size {batch_size} cannot be shared by {world} processes: choose a divisor of it.")
    if world % ep_size:
        raise UserError(
            f"moe.ep_size={ep_size} needs a multiple of {ep_size} processes, there are {world}: start it with "
            f"torchrun --nproc_per_node {ep_size} -m upcycle_bench run ..."
        )


# Rank 0 calibrates and evaluates alone. The other ranks wait for it, perhaps for hours.
PATIENCE = timedelta(days=1)

_cpu_groups: dict[str, tuple[Any, Any]] = {}  # by purpose: the whole group at that time, and the one of its own


def cpu_group(purpose: str) -> Any:
    """A group of all ranks that talks by CPU, for this purpose alone: a thread may use it beside the training.

    Every rank must call it. None for a single process.
    """
    if not dist.is_initialized() or world_size() == 1:
        return None
    whole = dist.group.WORLD
    if purpose not in _cpu_groups or _cpu_groups[purpose][0] is not whole:
        _cpu_groups[purpose] = (whole, dist.new_group(backend="gloo", timeout=PATIENCE))
    return _cpu_groups[purpose][1]


def from_all(value: Any, group: Any = None) -> list[Any]:
    """The values (any picklable objects) of all ranks, on every rank."""
    if not dist.is_initialized() or world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values
