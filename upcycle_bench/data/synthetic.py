"""Random pairs in the protocol's shape, made in memory: `--data synthetic` measures a training without its storage.

pairs = SyntheticPairs(clip)        # as many as are permuted as a whole; they repeat some hundred
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from upcycle_bench.data.batches import Loading
from upcycle_bench.data.decoded import Decoded
from upcycle_bench.data.index import ROW, Index
from upcycle_bench.data.order import WINDOW
from upcycle_bench.data.pairs import USUAL, PairDataset
from upcycle_bench.data.world import SYNTHETIC
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.towers import image_size
from upcycle_bench.protocol import Data
from upcycle_bench.util.rng import Stream

POOL = 512  # images that are made
WORDS = ("a", "photo", "of", "two", "small", "red", "cats", "in", "front", "the", "old", "house", "beside", "trees")


class SyntheticPairs(PairDataset):
    """Pairs whose pixels and captions are random; pair n is number n modulo POOL."""

    def __init__(self, clip: Clip, settings: Data = USUAL) -> None:
        super().__init__((), clip, keep_decoded=False, settings=settings, loading=Loading(workers=0))
        generator = Stream((SYNTHETIC,)).generator()
        shape = (POOL, 3, *image_size(clip.model))
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator).numpy()
        words, length = (torch.randint(1, top, (POOL, 20), generator=generator) for top in (len(WORDS), 20))
        texts = [" ".join(WORDS[word] for word in row[: int(n[0])]) for row, n in zip(words, length, strict=True)]
        self.decoded = _Repeated(images, clip.tokenize(texts).numpy(), np.arange(POOL + 1))

    @cached_property
    def index(self) -> Index:
        """One shard that is nowhere."""
        rows = np.broadcast_to(np.zeros((), dtype=ROW), (WINDOW,))
        return Index([SYNTHETIC], [0], np.array([0, WINDOW]), rows, SYNTHETIC)


class _Repeated(Decoded):
    """Arrays of POOL samples that stand for many more."""

    def __len__(self) -> int:
        return WINDOW

    def pixels(self, index: np.ndarray) -> Tensor:
        return super().pixels(index % POOL)

    def texts(self, index: np.ndarray, *_: object) -> Tensor:
        return torch.from_numpy(self.tokens[index % POOL].astype(np.int64))
