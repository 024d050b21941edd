"""Training pairs from webdataset shards: every batch is a pure function of (seed, step).

    pairs = PairDataset(shards, clip)
    batch = pairs.batch(seed=0, step=7, batch_size=512)

Which samples are pairs, `upcycle_bench/data/pair_index.py` decides. Any sample can be read at any time. So training
resumes at any step, ranks take slices of one global batch, and no strategy's draws change the order. Small data sets
without augmentation are decoded once (`upcycle_bench/data/decoded.py`).

Shape suffixes: S steps.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from upcycle_bench.data.decoded import Decoded, decoded
from upcycle_bench.data.loading import load
from upcycle_bench.data.open_index import open_index
from upcycle_bench.data.pair_index import Counts, PairIndex, index_pairs
from upcycle_bench.data.shards import open_image, shards_digest
from upcycle_bench.data.sources import Sources
from upcycle_bench.data.world import World
from upcycle_bench.model.clip import Clip
from upcycle_bench.protocol import Captions
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

TOKENISED_LIMIT = 1 << 20  # captions whose tokens stay in memory


@dataclass(frozen=True)
class Batch:
    """images: uint8 [B, 3, H, W]; texts: int64 [B, L]; index: int64 [B], the numbers of the samples."""

    images: Tensor
    texts: Tensor
    index: Tensor


class BatchSource(ABC):
    """What a training reads: the batch of each step, of this rank."""

    @abstractmethod
    def batch(self, seed: int | str, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Batch:
        """Slice number `rank`, of `world` equal ones, of the global batch of `step`."""

    def batches(
        self, seed: int | str, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """The batches of the steps [start, stop), read ahead by `workers` processes."""

        def make(step: int) -> Batch:
            return self.batch(seed, step, batch_size, rank, world)

        return load(make, range(start, stop), workers, "training batches")


class PairDataset(BatchSource):
    """All training pairs of some shards. Raises UserError, with `option`, for a bad shard, and where there is no pair.

    `augmentation` is "none" or "random-resized-crop"; `captions`: what a .txt is. `keep_decoded=False` is for pairs
    that are read once, which are not worth decoding into the cache. `decoded` holds the decoded arrays, or None where
    the shards are read each time.
    """

    def __init__(
        self,
        shards: Sequence[Path | str],
        clip: Clip,
        augmentation: str = "none",
        *,
        captions: Captions = "lines",
        option: str = "",
        keep_decoded: bool = True,
    ) -> None:
        self.clip, self.augmentation = clip, augmentation
        self.shards, self.source = list(shards), (captions, option)
        self._index: PairIndex | None = None
        self._tokens: dict[str, Tensor] = {}
        self._order: tuple[tuple[int | str, int], Tensor] | None = None  # (seed, epoch) and order of the last batch
        self.decoded: Decoded | None = None
        if augmentation == "none" and keep_decoded:
            digest = shards_digest(self.shards)
            self.decoded = decoded(digest, clip.name, lambda: self, captions, clip.preprocess)
        if self.decoded is None:
            _ = self.index

    def __len__(self) -> int:
        return len(self.index.images) if self.decoded is None else len(self.decoded)

    @property
    def index(self) -> PairIndex:
        """The places of all images, and all captions; read from the shards where it is first needed."""
        if self._index is None:
            open_index(Sources.of(self.shards), self.source[1])  # judges the shards
            self._index = index_pairs(self.shards, *self.source)
        return self._index

    @property
    def captions(self) -> list[list[str]]:
        """The captions of each pair."""
        return self.index.captions

    @property
    def counts(self) -> Counts:
        """How many pairs there are, and how many samples are left out, by kind."""
        index = open_index(Sources.of(self.shards), self.source[1])
        return Counts(len(index), dict(index.left_out))

    def say_left_out(self) -> None:
        """Say on rank 0's stderr how many samples are left out, if any are."""
        if distributed.is_main() and self.counts.left_out:
            where = self.source[1] or self.shards[0]
            print(f"warning: {where}: {self.counts} (`upcycle-bench data check` says more)", file=sys.stderr)

    def batch(self, seed: int | str, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Batch:
        """Slice number `rank` of the global batch of `step`; captions and crops are drawn anew in each step.

        An epoch is a permutation of all pairs, without the incomplete batch at its end. Raises UserError if there are
        fewer pairs than a batch has.
        """
        steps_per_epoch = len(self) // batch_size
        if steps_per_epoch == 0:
            where = f"{self.source[1]}: ".removeprefix(": ")
            raise UserError(f"{where}the training set has {len(self)} pairs, fewer than one batch of {batch_size}.")
        epoch, place = divmod(step, steps_per_epoch)
        if self._order is None or self._order[0] != (seed, epoch):
            generator = Stream(("data order", seed, epoch)).generator()
            self._order = (seed, epoch), torch.randperm(len(self), generator=generator)
        order = self._order[1]
        share = batch_size // world
        first = place * batch_size + rank * share
        return self.pick(order[first : first + share], Stream(("augmentation", seed, step)))

    def pick(self, index: Tensor, rng: Stream) -> Batch:
        """The samples in `index`, int64 [B]. Each sample draws its caption and its crop from its own child of `rng`."""
        if self.decoded is not None:
            rows = index.numpy()
            texts_BL = self.decoded.texts(rows, lambda sample, number: _choice(rng, sample, number))
            return Batch(torch.from_numpy(self.decoded.images[rows]), texts_BL, index)
        images, texts = [], []
        for sample in index.tolist():
            images.append(self._augmented(sample, rng) if self.augmentation != "none" else self.read(sample))
            captions = self.index.captions[sample]
            caption = captions[_choice(rng, sample, len(captions))]
            if len(self._tokens) > TOKENISED_LIMIT:
                self._tokens.clear()
            if caption not in self._tokens:
                self._tokens[caption] = self.clip.tokenize([caption])[0]
            texts.append(self._tokens[caption])
        return Batch(torch.from_numpy(np.stack(images)), torch.stack(texts), index)

    def _augmented(self, sample: int, rng: Stream) -> np.ndarray:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.child("crop", sample).seed())
            return self.clip.augment(self._open(sample))

    def read(self, sample: int) -> np.ndarray:
        """The sample's image at the model's resolution, without augmentation, uint8 [3, H, W]."""
        return self.clip.resize(self._open(sample))

    def _open(self, sample: int) -> Image.Image:
        shard, offset, size = self.index.images[sample]
        return open_image(self.shards[shard], offset, size, "remove it", self.source[1])

    def shard_numbers(self) -> Tensor:
        """The number of each sample's shard, int64 [samples]; reads the shards' headers."""
        return torch.tensor([shard for shard, _, _ in self.index.images])

    def calibration(self, rng: Stream, pairs: int, batch_size: int) -> Iterator[Batch]:
        """`pairs` distinct random pairs, or all if there are fewer, in batches; the same on every rank."""
        order = torch.randperm(len(self), generator=rng.child("pairs").generator())[:pairs]
        for part in order.split(batch_size):
            yield self.pick(part, rng.child("captions"))


def training_pairs(world: World, clip: Clip, augmentation: str) -> PairDataset:
    """The training pairs of a world; of a user's own data it is said what is left out."""
    pairs = PairDataset(world.train_shards, clip, augmentation, captions=world.captions, option=world.option)
    if world.option:
        pairs.say_left_out()
    return pairs


def _choice(rng: Stream, sample: int, number: int) -> int:
    """Which of its `number` captions the sample gets from `rng`."""
    return rng.child("caption", sample).seed() % number if number > 1 else 0


class PickedBatches(BatchSource):
    """Batches whose samples the caller has chosen, int64 [S, B]."""

    def __init__(self, pairs: PairDataset, index_SB: Tensor) -> None:
        self.pairs, self.index_SB = pairs, index_SB

    def batch(self, seed: int | str, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Batch:
        """Slice number `rank` of the batch that was chosen for `step`."""
        share = batch_size // world
        index_B = self.index_SB[step, rank * share : (rank + 1) * share]
        return self.pairs.pick(index_B, Stream(("augmentation", seed, step)))
