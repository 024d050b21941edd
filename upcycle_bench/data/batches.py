"""Batches of training pairs, and what gives them: every batch is a pure function of (seed, step).

    for batch in data.batches("upcycling 0", 0, 100, 512, rank, world, device): ...

With `loading.workers` processes, process j makes part j of every batch, so it meets the pairs that stand beside those
it has read. Where there are more processes than parts, they take turns by groups of steps, whose pairs stand together.
The parts are joined here, for a GPU in pinned memory. The bits do not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upcycle_bench.data.bad_samples import Bad
from upcycle_bench.data.loading import load

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Loading:
    """How batches are read ahead, which changes none of them.

    workers: processes on each rank; None: four for a GPU, none for a CPU, whose cores all train. prefetch: batches that
    they make ahead.
    """

    workers: int | None = None
    prefetch: int = 2

    def workers_for(self, device: torch.device) -> int:
        """How many processes load batches for a model on `device`."""
        return (4 if device.type == "cuda" else 0) if self.workers is None else self.workers


@dataclass(frozen=True)
class Batch:
    """images: uint8 [B, 3, H, W]; texts: int64 [B, L]; index: int64 [B], the numbers of the samples.

    bad: the bad samples that were met while it was read, in whose places others stand.
    """

    images: Tensor
    texts: Tensor
    index: Tensor
    bad: tuple[Bad, ...] = ()


class BatchSource(ABC):
    """What a training reads: the batch of each step, of this rank.

    A process that loads batches makes every `turns`-th group of steps, and none from step `stop` on.
    """

    loading = Loading()
    turns, stop = 1, 0

    @abstractmethod
    def part(self, seed: int | str, step: int, batch_size: int, first: int, last: int) -> Batch:
        """The places [first, last) of the global batch of `step`."""

    def cuts(self, batch_size: int, first: int, last: int, parts: int) -> list[int]:
        """Where to cut the places [first, last) of a batch into at most `parts` parts; the first, and `last`, too."""
        parts = min(parts, last - first)
        return [first + (last - first) * part // parts for part in range(parts + 1)]

    def group_of(self, batch_size: int, step: int) -> int:
        """The number of the group of `step`: steps side by side whose samples stand together."""
        del batch_size
        return step

    def together(self, batch_size: int) -> int:
        """How many steps a group has at most."""
        del batch_size
        return 1

    def judge(self, kinds: Mapping[str, int], first: Mapping[str, str], read: int) -> None:
        """Raise UserError if too many of the `read` samples were bad: so many of each kind, the first of them there."""
        del kinds, first, read  # a source that reads no samples has no bad ones

    def found(self, bad: Sequence[Bad]) -> None:
        """Take note of bad samples that any rank has met; called on rank 0."""
        del bad

    def batch(self, seed: int | str, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Batch:
        """Slice number `rank`, of `world` equal ones, of the global batch of `step`."""
        share = batch_size // world
        return self.part(seed, step, batch_size, rank * share, (rank + 1) * share)

    def batches(
        self,
        seed: int | str,
        start: int,
        stop: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device = CPU,
    ) -> Generator[Batch, None, None]:
        """The batches of the steps [start, stop), read ahead as `loading` says, for a model on `device`."""
        share, workers = batch_size // world, self.loading.workers_for(device)
        cuts = self.cuts(batch_size, rank * share, (rank + 1) * share, max(1, workers))
        if workers > (most := len(cuts) - 1):  # as many parts as leave no process without a turn, if there are such
            parts = max(range(1, most + 1), key=lambda number: (number * (workers // number), number))
            cuts = self.cuts(batch_size, rank * share, (rank + 1) * share, parts)
        parts = len(cuts) - 1

        def make(item: int) -> Batch:
            step, part = divmod(item, parts)
            return self.part(seed, step, batch_size, cuts[part], cuts[part + 1])

        def items(turn: int) -> Iterator[int]:
            for step in range(start, stop):
                if self.group_of(batch_size, step) % turns == turn:
                    yield from range(step * parts, (step + 1) * parts)

        self.turns = turns = max(1, workers // parts)
        self.stop = stop
        ahead = self.loading.prefetch if turns == 1 else max(self.loading.prefetch, self.together(batch_size))
        with contextlib.ExitStack() as ends:
            made = [
                load(make, items(turn), min(workers, parts), "training batches", prefetch=ahead)
                for turn in range(turns if start < stop else 0)  # whose turn is next makes all of its group meanwhile
            ]
            for each in made:
                ends.enter_context(contextlib.closing(each))
            for step in range(start, stop):
                own = made[self.group_of(batch_size, step) % turns]
                yield join([next(own) for _ in range(parts)], pinned=device.type == "cuda")


def join(parts: Sequence[Batch], pinned: bool) -> Batch:
    """One batch of several parts; `pinned`: in memory from which a GPU copies while the CPU goes on."""
    if len(parts) == 1 and not pinned:
        return parts[0]

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
        return torch.cat(list(tensors), out=torch.empty(shape, dtype=tensors[0].dtype, pin_memory=pinned))

    images, texts, index = (joined([getattr(part, name) for part in parts]) for name in ("images", "texts", "index"))
    return Batch(images, texts, index, tuple(bad for part in parts for bad in part.bad))
