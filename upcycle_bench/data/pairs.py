"""Training pairs from webdataset shards: every batch is a pure function of (seed, step).

    pairs = PairDataset(shards, clip)
    batch = pairs.batch(seed=0, step=7, batch_size=512)

Any pair can be read at any time. So training resumes at any step, ranks take slices of one global batch, and no
strategy's draws change the order (`upcycle_bench/data/order.py`). Small data sets without augmentation are decoded once
(`upcycle_bench/data/decoded.py`).

In the place of a bad sample another pair is read: attempt 0, 1, ... draws one at random, from a stream that depends on
seed, step and the bad pair alone. A pair that the index lists as bad is replaced alike, without being read.

Shape suffixes: S steps.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from upcycle_bench.data import places
from upcycle_bench.data.bad_samples import Bad, BadSample, Tally, captions_of, image_of, require_few
from upcycle_bench.data.batches import Batch, BatchSource, Loading
from upcycle_bench.data.blocks import Reader
from upcycle_bench.data.decoded import Decoded, decoded, fits
from upcycle_bench.data.index import NOWHERE, Index
from upcycle_bench.data.open_index import open_index
from upcycle_bench.data.order import Order, distinct
from upcycle_bench.data.pair_index import Counts
from upcycle_bench.data.shards import shards_digest
from upcycle_bench.data.sources import Sources
from upcycle_bench.model.clip import Clip
from upcycle_bench.protocol import Captions, Data
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

T = TypeVar("T")
ATTEMPTS = 100  # pairs that are tried for one place, before the whole data set is taken for bad
USUAL = Data(world="local", seed=0)


class PairDataset(BatchSource):
    """All training pairs of some shards. Raises UserError, with `option`, for a bad shard, and where there is no pair.

    `augmentation` is "none" or "random-resized-crop"; `captions`: what a .txt is; `settings`: a protocol's, for order
    and bad samples. `keep_decoded=False` is for pairs that are read once, which are not worth decoding into the cache.
    `decoded` holds the decoded arrays, or None where the shards are read each time. `on_bad` is called on rank 0 with
    bad samples that are met for the first time. `index`: that of the shards, where it has been opened.
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
        settings: Data = USUAL,
        loading: Loading | None = None,
        index: Index | None = None,
        on_bad: Callable[[Sequence[Bad]], None] = lambda bad: None,
    ) -> None:
        self.clip, self.augmentation, self.settings = clip, augmentation, settings
        self.shards, self._captions, self.option = list(shards), captions, option
        self.loading, self._on_bad, self._given = loading or Loading(), on_bad, index
        self.order = lru_cache(2)(self._make_order)
        self._named: set[str] = set()  # kinds of listed pairs of which one has been named
        self._expected: tuple[int | str, int, int, int] | None = None  # seed, first step of a group, places
        self.decoded: Decoded | None = None
        if augmentation == "none" and keep_decoded and (index is None or (fits(len(index), clip) and _is_whole(index))):
            digest = shards_digest(self.shards) if index is None else _content(index)
            self.decoded = decoded(digest, clip.name, lambda: self, captions, clip.preprocess)
        if self.decoded is None:
            _ = self.index
        if settings.weights:
            self.order(1)  # it refuses weights of other sources now, not after hours of calibration

    def __len__(self) -> int:
        return len(self.index) if self.decoded is None else len(self.decoded)

    @cached_property
    def index(self) -> Index:
        """The places of all images and captions; opened where it is first needed, if it was not given."""
        return self._given or open_index(Sources.of(self.shards), self.option, bad_samples=self.settings.bad_samples)

    @cached_property
    def reader(self) -> Reader:
        """What reads the shards."""
        return Reader(self.index)

    @cached_property
    def listed(self) -> Mapping[int, str]:
        """The pairs that are known to be bad; a world that is built has none."""
        return {} if self.decoded is not None and not self.option else self.index.bad

    @property
    def counts(self) -> Counts:
        """How many pairs there are, and how many samples are left out, by kind."""
        return Counts(len(self), dict(self.index.left_out))

    def say_left_out(self) -> None:
        """Say on rank 0's stderr how many samples are left out, if any are."""
        if distributed.is_main() and self.counts.left_out:
            where = self.option or self.shards[0]
            print(f"warning: {where}: {self.counts} (`upcycle-bench data check` says more)", file=sys.stderr)

    def part(self, seed: int | str, step: int, batch_size: int, first: int, last: int) -> Batch:
        """The places [first, last) of the global batch of `step`; captions and crops are drawn anew in each step.

        What these places have in the next steps is read with it where it stands side by side. Raises UserError if there
        are fewer pairs than a batch has.
        """
        group_MB, row = self.order(batch_size).group(seed, step)
        expected = seed, step - row, first, last
        if self.decoded is None and self._expected != expected:
            later = self.order(batch_size).first_step(self.group_of(batch_size, step) + self.turns)
            groups = [group_MB[row:], *([self.order(batch_size).group(seed, later)[0]] if later < self.stop else [])]
            self.reader.expect(*(each_MB[:, first:last].flatten().numpy() for each_MB in groups))
            self._expected = expected
        return self._read(group_MB[row, first:last], Stream(("augmentation", seed, step)))

    def cuts(self, batch_size: int, first: int, last: int, parts: int) -> list[int]:
        """As in `BatchSource`; each part has lanes of its own, so there may be fewer than `parts`."""
        return self.order(batch_size).cuts(first, last, parts)

    def group_of(self, batch_size: int, step: int) -> int:
        """As in `BatchSource`: that of the order."""
        return self.order(batch_size).group_of(step)

    def together(self, batch_size: int) -> int:
        """As in `BatchSource`: of the order."""
        return self.order(batch_size).together

    def pick(self, index: Tensor, rng: Stream) -> Batch:
        """The samples in `index`, int64 [B]. Each sample draws its caption and its crop from its own child of `rng`."""
        if self.decoded is None:
            self.reader.expect(index.numpy())
            self._expected = None
        return self._read(index, rng)

    def _read(self, index: Tensor, rng: Stream) -> Batch:
        bad: list[Bad] = []
        if self.decoded is not None:
            rows = index.numpy()
            if self.decoded.bad or self.listed:
                rows = np.array([self._good(wanted, rng, bad, self._require)[0] for wanted in index.tolist()])
            texts_BL = self.decoded.texts(rows, lambda sample, number: _choice(rng, sample, number))
            return Batch(self.decoded.pixels(rows), texts_BL, torch.from_numpy(rows), tuple(bad))
        numbers, images, texts = [], [], []
        for wanted in index.tolist():
            number, (image, captions) = self._good(wanted, rng, bad, self._open)
            numbers.append(number)
            images.append(
                self._augmented(image, number, rng) if self.augmentation != "none" else self.clip.resize(image)
            )
            texts.append(captions[_choice(rng, number, len(captions))])
        pixels = torch.from_numpy(np.stack(images))
        return Batch(pixels, self.clip.tokenize(texts), torch.tensor(numbers), tuple(bad))

    def _good(self, wanted: int, rng: Stream, bad: list[Bad], read: Callable[[int], T]) -> tuple[int, T]:
        """The pair that stands in the place of `wanted`, itself unless it is bad, and what `read` makes of it.

        The bad ones that are met are added to `bad`. Those that are listed are not read, and count alike: so what a
        training counts does not depend on when it was interrupted.
        """
        number, tried = wanted, set()
        for attempt in range(ATTEMPTS):
            if number not in tried:
                try:
                    if number in self.listed:
                        raise BadSample(self.listed[number], key=self._name_of_listed(number))
                    return number, read(number)
                except BadSample as error:
                    bad.append(self.described(number, error))
                    tried.add(number)
            number = rng.child("replacement", wanted, attempt).seed() % len(self)
        raise UserError(
            f"{self.option or self.shards[0]}: none of {ATTEMPTS} pairs that were drawn can be used (the last: "
            f"{bad[-1].kind} at {bad[-1].place}); see `upcycle-bench data check SHARDS`."
        )

    def _name_of_listed(self, number: int) -> str:
        """The name of the first listed pair of its kind that is met here, by which one line tells the kind; else ""."""
        if (kind := self.listed[number]) in self._named:
            return ""
        self._named.add(kind)
        return self.reader.name(number)

    def described(self, number: int, error: BadSample) -> Bad:
        """A bad sample, with its place."""
        shard = self.index.shards[int(self.index.shard_of(np.int64(number)))]
        return Bad(number, error.kind, Path(shard).name, error.key)

    def _require(self, number: int) -> None:
        assert self.decoded is not None
        if number in self.decoded.bad:
            raise BadSample(*self.decoded.bad[number])

    def _open(self, number: int) -> tuple[Image.Image, list[str]]:
        """The image and the captions of a pair; BadSample, with its name."""
        raw = self.reader.read(number)
        try:
            return image_of(raw.image), captions_of(raw.text, self._captions)
        except BadSample as error:
            error.key = raw.key
            raise

    def _augmented(self, image: Image.Image, number: int, rng: Stream) -> np.ndarray:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.child("crop", number).seed())
            return self.clip.augment(image)

    def decode(self, number: int) -> tuple[np.ndarray, list[str]]:
        """A pair's image at the model's resolution, uint8 [3, H, W], without augmentation, and its captions.

        Raises BadSample.
        """
        image, captions = self._open(number)
        return self.clip.resize(image), captions

    def judge(self, kinds: Mapping[str, int], first: Mapping[str, str], read: int) -> None:
        """UserError if more than `settings.bad_samples` of the `read` samples were bad."""
        where = self.option or "the training set"
        require_few(kinds, first, read=read, pairs=len(self), bound=self.settings.bad_samples, where=where)

    def found(self, bad: Sequence[Bad]) -> None:
        """Hand on bad samples that were met for the first time."""
        self._on_bad(bad)

    def shard_numbers(self) -> Tensor:
        """The number of each sample's shard, int32 [samples]."""
        sizes = np.diff(self.index.starts)
        return torch.from_numpy(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))

    def calibration(self, rng: Stream, pairs: int, batch_size: int) -> Iterator[Batch]:
        """`pairs` distinct random pairs, or all if there are fewer, in batches; the same on every rank."""
        tally, read = Tally(), 0
        for part in distinct(len(self), pairs, rng.child("pairs")).split(batch_size):
            batch = self.pick(part, rng.child("captions"))
            tally.add(batch.bad)
            read += len(part)
            self.judge(tally.kinds, tally.first, read)
            yield batch

    def _make_order(self, batch_size: int) -> Order:
        """The order of batches of that size; the index is only read for more pairs than are permuted as a whole."""
        chosen, replacement = self.settings, self.settings.order == "replacement"
        whole = len(self) <= chosen.window and not replacement
        starts, source = (np.array([0, len(self)]), [0]) if whole else (self.index.starts, self.index.source)
        try:
            return Order(
                starts, source, batch_size, window=chosen.window, replacement=replacement, weights=chosen.weights
            )
        except UserError as error:
            raise UserError(f"{self.option}: {error}".removeprefix(": ")) from None


def _is_whole(index: Index) -> bool:
    """Whether no pair is lost with a shard that is not whole, and may be put back."""
    return not (index.rows["image"] == NOWHERE).any()


def _content(index: Index) -> str:
    """A hash of the pairs with their numbers and places, and of when files were written, if not of each pixel."""
    total = hashlib.sha256(index.identity.encode())
    total.update(index.rows.tobytes())
    for place in filter(places.is_local, index.shards):
        total.update(f"{places.stamp(place)}\n".encode())
    return total.hexdigest()


def _choice(rng: Stream, sample: int, number: int) -> int:
    """Which of its `number` captions the sample gets from `rng`."""
    return rng.child("caption", sample).seed() % number if number > 1 else 0


class PickedBatches(BatchSource):
    """Batches whose samples the caller has chosen, int64 [S, B]."""

    def __init__(self, pairs: PairDataset, index_SB: Tensor) -> None:
        self.pairs, self.index_SB, self.loading = pairs, index_SB, pairs.loading
        self.judge, self.found = pairs.judge, pairs.found  # type: ignore[method-assign]

    def part(self, seed: int | str, step: int, batch_size: int, first: int, last: int) -> Batch:
        """The places [first, last) of the batch that was chosen for `step`."""
        return self.pairs.pick(self.index_SB[step, first:last], Stream(("augmentation", seed, step)))
