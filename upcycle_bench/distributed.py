"""Ranks and collectives, the same calls with one process and with many.

One process needs no launcher; several are started by `torchrun`, which sets RANK, WORLD_SIZE and LOCAL_RANK.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """This process's rank; known before the process group exists, since torchrun tells it."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes take part."""
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
    """The ranks' tensors, of one shape, one after the other along the first dimension, on every rank."""
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
    """What to multiply a local sum by, so that its mean over ranks is the mean over all ranks' items together."""
    return world_size() / max(1, sum_over_ranks(local_count))  # nobody has an item: the sum is 0
