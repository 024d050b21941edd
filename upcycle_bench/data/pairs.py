"""Training pairs from webdataset shards: every batch is a pure function of (seed, step).

    pairs = PairDataset(shards, clip)
    batch = pairs.batch(seed=0, step=7, batch_size=512)

Shards are local tar files with `KEY.png|jpg|webp` and `KEY.txt`, one caption a line. Any sample can be read at any
time. So training resumes at any step, ranks take slices of one global batch, and no strategy's draws change the order.
Small data sets without augmentation are decoded once (`upcycle_bench/data/decoded.py`).

Shape suffixes: S steps.
"""

from __future__ import annotations

import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from upcycle_bench.data.decoded import Decoded, decoded
from upcycle_bench.data.shards import open_image, read_member, samples_of, shards_digest
from upcycle_bench.model.clip import Clip
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
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
        steps = _Steps(self, seed, batch_size, rank, world)
        yield from DataLoader(steps, batch_size=None, sampler=range(start, stop), num_workers=workers)


class _Steps(Dataset[Batch]):
    """Step number -> batch, for the data loader's workers."""

    def __init__(self, source: BatchSource, seed: int | str, batch_size: int, rank: int, world: int) -> None:
        self.source, self.arguments = source, (seed, batch_size, rank, world)

    def __getitem__(self, step: int) -> Batch:
        seed, batch_size, rank, world = self.arguments
        return self.source.batch(seed, step, batch_size, rank, world)


class PairDataset(BatchSource):
    """All training pairs of some shards. Raises UserError for shards that cannot be read or have no pair.

    `augmentation` is "none" or "random-resized-crop". `keep_decoded=False` is for pairs that are read once, which are
    not worth decoding into the cache. `decoded` holds the decoded arrays, or None where the shards are read each time.
    """

    def __init__(
        self, shards: Sequence[Path], clip: Clip, augmentation: str = "none", *, keep_decoded: bool = True
    ) -> None:
        self.clip, self.augmentation = clip, augmentation
        self.shards = list(shards)
        self.images: list[tuple[int, int, int]] = []  # shard, offset, bytes
        self.captions: list[list[str]] = []
        self._tokens: dict[str, Tensor] = {}
        self._order: tuple[tuple[int | str, int], Tensor] | None = None  # (seed, epoch) and order of the last batch
        self.decoded: Decoded | None = None
        if augmentation == "none" and keep_decoded:
            self.decoded = decoded(shards_digest(self.shards), clip.name, self._indexed, clip.preprocess)
        if self.decoded is None:
            self._indexed()

    def __len__(self) -> int:
        return len(self.images) if self.decoded is None else len(self.decoded)

    def _indexed(self) -> PairDataset:
        """This data set, after the first call with the places of all images, and all captions."""
        if not self.images:
            for number, shard in enumerate(self.shards):
                self._index(number, shard)
        if not self.images:
            raise UserError(f"{self.shards[0]}: no sample with an image and a .txt caption in these shards.")
        return self

    def _index(self, number: int, shard: Path) -> None:
        try:
            samples = samples_of(shard)
        except tarfile.TarError as error:
            raise UserError(f"{shard}: not a readable tar file ({error}); write it again.") from None
        with shard.open("rb") as file:
            for members in samples.values():
                image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
                if image is None or "txt" not in members:
                    continue
                lines = read_member(file, members["txt"]).decode("utf-8", "replace").splitlines()
                captions = [line.strip() for line in lines if line.strip()]
                if captions:
                    self.images.append((number, image.offset_data, image.size))
                    self.captions.append(captions)

    def batch(self, seed: int | str, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Batch:
        """Slice number `rank` of the global batch of `step`; captions and crops are drawn anew in each step.

        An epoch is a permutation of all pairs, without the incomplete batch at its end. Raises UserError if there are
        fewer pairs than a batch has.
        """
        steps_per_epoch = len(self) // batch_size
        if steps_per_epoch == 0:
            raise UserError(f"the training set has {len(self)} pairs, fewer than one batch of {batch_size}.")
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
            captions = self.captions[sample]
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
        shard, offset, size = self.images[sample]
        return open_image(self.shards[shard], offset, size, "remove it")

    def shard_numbers(self) -> Tensor:
        """The number of each sample's shard, int64 [samples]; reads the shards' headers."""
        return torch.tensor([shard for shard, _, _ in self._indexed().images])

    def calibration(self, rng: Stream, pairs: int, batch_size: int) -> Iterator[Batch]:
        """`pairs` distinct random pairs, or all if there are fewer, in batches; the same on every rank."""
        order = torch.randperm(len(self), generator=rng.child("pairs").generator())[:pairs]
        for part in order.split(batch_size):
            yield self.pick(part, rng.child("captions"))


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
