"""Training pairs from webdataset shards: every batch is a pure function of (seed, step), whoever asks for it.

The shards (local tar files with `KEY.png|jpg|webp` and `KEY.txt`, one caption a line) are indexed once by offset, so
any sample can be read at any time: training resumes at any step without replaying, ranks take slices of one global
batch, and what a strategy draws cannot shift the order. Small data sets without augmentation are decoded once
(`upcycle_bench/data/decoded.py`).
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from upcycle_bench.data.decoded import decoded
from upcycle_bench.data.shards import open_image, shards_digest
from upcycle_bench.model.clip import Clip
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
TOKENISED_LIMIT = 1 << 20  # captions whose tokens we keep


@dataclass(frozen=True)
class Batch:
    """images: uint8 [b, 3, H, W]; texts: int64 [b, L]; index: int64 [b], the samples' numbers."""

    images: Tensor
    texts: Tensor
    index: Tensor


class PairDataset:
    """All training pairs of some shards; see the module docstring. Raises UserError for unusable shards.

    `keep_decoded` False: the pairs are read once, so their pixels are not kept in the cache.
    """

    def __init__(
        self, shards: Sequence[Path], clip: Clip, augmentation: str = "none", *, keep_decoded: bool = True
    ) -> None:
        self.clip, self.augmentation = clip, augmentation
        self.shards = list(shards)
        self.images: list[tuple[int, int, int]] = []  # shard, offset, bytes
        self.captions: list[list[str]] = []
        self._tokens: dict[str, Tensor] = {}
        self._order: tuple[tuple[int | str, int], Tensor] | None = None  # of the epoch last asked for
        self._decoded = None
        if augmentation == "none" and keep_decoded:
            self._decoded = decoded(shards_digest(self.shards), clip.name, self._indexed)
        if self._decoded is None:
            self._indexed()

    def __len__(self) -> int:
        return len(self.images) if self._decoded is None else len(self._decoded)

    def _indexed(self) -> PairDataset:
        if not self.images:
            for number, shard in enumerate(self.shards):
                self._index(number, shard)
        if not self.images:
            raise UserError(f"{self.shards[0]}: no sample with an image and a .txt caption in these shards.")
        return self

    def _index(self, number: int, shard: Path) -> None:
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(shard) as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    key, _, suffix = name.partition(".")
                    if member.isfile():
                        samples.setdefault(f"{folder}/{key}", {})[suffix.lower()] = member
        except tarfile.TarError as error:
            raise UserError(f"{shard}: not a readable tar file ({error}); write it again.") from None
        with shard.open("rb") as file:
            for parts in samples.values():
                image = next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None)
                if image is None or "txt" not in parts:
                    continue
                file.seek(parts["txt"].offset_data)
                lines = file.read(parts["txt"].size).decode("utf-8", "replace").splitlines()
                lines = [line.strip() for line in lines if line.strip()]
                if lines:
                    self.images.append((number, image.offset_data, image.size))
                    self.captions.append(lines)

    def batch(self, seed: int | str, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's slice of the global batch of `step`; epochs are permutations without their incomplete end."""
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
        """The named samples; captions and crops are drawn from `rng`, each sample's own part of it."""
        if self._decoded is not None:
            rows = index.numpy()
            texts_BL = self._decoded.texts(rows, lambda sample, number: _choice(rng, sample, number))
            return Batch(torch.from_numpy(self._decoded.images[rows]), texts_BL, index)
        images, texts = [], []
        for sample in index.tolist():
            images.append(self._augmented(sample, rng) if self.augmentation != "none" else self.read(sample))
            lines = self.captions[sample]
            caption = lines[_choice(rng, sample, len(lines))]
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
        """The sample's image as the model wants it, without augmentation, uint8 [3, H, W]."""
        return self.clip.resize(self._open(sample))

    def _open(self, sample: int) -> Image.Image:
        shard, offset, size = self.images[sample]
        return open_image(self.shards[shard], offset, size, "remove it")

    def batches(
        self, seed: int | str, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """Batches of the steps [start, stop), read ahead by `workers` processes."""
        steps = _Steps(self, seed, batch_size, rank, world)
        yield from DataLoader(steps, batch_size=None, sampler=range(start, stop), num_workers=workers)

    def shard_numbers(self) -> Tensor:
        """The shard that every sample stands in, int64 [samples]; reads the shards' tables of contents."""
        return torch.tensor([shard for shard, _, _ in self._indexed().images])

    def calibration(self, rng: Stream, pairs: int, batch_size: int) -> Iterator[Batch]:
        """`pairs` distinct random pairs (at most all), in batches; the same for every rank and world size."""
        order = torch.randperm(len(self), generator=rng.child("pairs").generator())[:pairs]
        for part in order.split(batch_size):
            yield self.pick(part, rng.child("captions"))


def _choice(rng: Stream, sample: int, number: int) -> int:
    """Which of `number` captions that sample shows this time."""
    return rng.child("caption", sample).seed() % number if number > 1 else 0


class PickedBatches:
    """Batches whose samples somebody chose, each in the place of `PairDataset`'s own: rows [steps, batch size]."""

    def __init__(self, pairs: PairDataset, rows: Tensor) -> None:
        self.pairs, self.rows = pairs, rows

    def batch(self, seed: int | str, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's slice of the row of `step`."""
        share = batch_size // world
        index = self.rows[step, rank * share : (rank + 1) * share]
        return self.pairs.pick(index, Stream(("augmentation", seed, step)))

    def batches(
        self, seed: int | str, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """Batches of the steps [start, stop), read ahead by `workers` processes."""
        steps = _Steps(self, seed, batch_size, rank, world)
        yield from DataLoader(steps, batch_size=None, sampler=range(start, stop), num_workers=workers)


BatchSource = PairDataset | PickedBatches


class _Steps(Dataset[Batch]):
    """Step number -> batch, for the data loader's workers."""

    def __init__(self, pairs: BatchSource, seed: int | str, batch_size: int, rank: int, world: int) -> None:
        self.pairs, self.arguments = pairs, (seed, batch_size, rank, world)

    def __getitem__(self, step: int) -> Batch:
        seed, batch_size, rank, world = self.arguments
        return self.pairs.batch(seed, step, batch_size, rank, world)
