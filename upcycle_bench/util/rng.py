"""Named random streams: each purpose has a generator of its own, whose seed is a hash of the purpose's name.

The order of the data, augmentation, patch dropout, each strategy, layer and expert have one each. So two strategies
with one training seed see the same batches, however many random numbers they draw.

    stream = Stream(("strategy", "cluster-aware", seed))
    noise = torch.randn(3, generator=stream.child("layer", 1).generator())
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Stream:
    """A random stream; equal keys give equal numbers on every machine, on every rank, with any number of threads."""

    key: tuple[str | int, ...]

    def child(self, *parts: str | int) -> Stream:
        """The stream of one part of this purpose: a layer, an expert, a step."""
        return Stream(self.key + parts)

    def seed(self, bits: int = 63) -> int:
        """A non-negative integer of `bits` bits; 31 for libraries whose seed is a C int (faiss)."""
        text = "\x1f".join(f"{type(part).__name__}:{part}" for part in self.key)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - bits)

    def generator(self) -> torch.Generator:
        """A CPU generator at the start of this stream."""
        import torch

        return torch.Generator().manual_seed(self.seed())
