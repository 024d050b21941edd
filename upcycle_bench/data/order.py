"""The order of the training pairs: which pairs the batch of a step has, as a pure function of (seed, step).

    order = Order(index.starts, index.source, batch_size=512)
    batches, row = order.group("upcycling 0", step=7)       # int64 [M, B]: batch 7 is its row `row`

Data of up to `window` pairs are permuted as a whole. Of more, an epoch is a sequence of blocks, so that a reader finds
its pairs side by side: shards are permuted, consecutive shards form windows, and the blocks of a window are permuted.
A group of M batches takes the next M * B pairs of the sequence, cuts them into L lanes of consecutive pairs, and
permutes the pairs of each lane; every batch has an equal part of each lane. A rank, or a loader's process, that takes
whole lanes of each batch reads each of its blocks once, and no batch depends on their number.

Shape suffixes: M batches of a group, L lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

WINDOW = 1 << 20  # pairs
BLOCK = 64  # consecutive pairs of a shard that stay together in the sequence
LANES = 64  # at most
MIXED = 1024  # pairs of a lane, at least, which are permuted among themselves

Seed = int | str


class Order:
    """The batches of every step, of data whose shard s has the pairs starts[s] to starts[s + 1].

    source: of each shard, the number of its source. With `replacement`, shards are drawn one after the other without
    end, and the batches cut that sequence; an epoch is only a number of draws. Then `weights` are the shares of the
    pairs that come from each source; without them, every pair is drawn equally often. Raises UserError where there are
    fewer pairs than `batch_size`, or not one weight for each source.
    """

    def __init__(
        self,
        starts: np.ndarray,
        source: Sequence[int],
        batch_size: int,
        *,
        window: int = WINDOW,
        replacement: bool = False,
        weights: Sequence[float] = (),
    ) -> None:
        self.starts, self.sizes, self.pairs = starts, np.diff(starts), int(starts[-1])
        self.batch_size, self.window = batch_size, window
        if self.pairs < batch_size:
            raise UserError(f"the training set has {self.pairs} pairs, fewer than one batch of {batch_size}.")
        self.whole = self.pairs <= window and not replacement
        self.lanes = 1 if self.whole else lanes_of(batch_size)
        self.together = 1 if self.whole else -(-MIXED // (batch_size // self.lanes))  # batches of a group at most
        self._chance = _chances(self.sizes, np.asarray(source), weights) if replacement else None
        self._draws = len(self.sizes)  # of an epoch
        if self._chance is not None:  # about a window of pairs at least, so that there are few epochs
            mean = float(np.diff(self._chance, prepend=0.0) @ self.sizes)
            self._draws = max(self._draws, int(np.ceil(window / mean)))
        self._ends: dict[Seed, list[int]] = {}  # the pairs before the end of each epoch, with replacement
        self._permutation = lru_cache(1)(self._make_permutation)
        self._epoch, self._window = lru_cache(2)(self._make_epoch), lru_cache(2)(self._make_window)
        self._group = lru_cache(2)(self._make_group)

    def group(self, seed: Seed, step: int) -> tuple[Tensor, int]:
        """The batches of the group of steps that `step` belongs to, int64 [M, B], and which of them is its own."""
        epoch, place = (0, step) if self._chance is not None else divmod(step, self.pairs // self.batch_size)
        if self.whole:
            return self._permutation(seed, epoch)[place * self.batch_size :][None, : self.batch_size], 0
        number, row = divmod(place, self.together)
        return self._group(seed, epoch, number), row

    def batch(self, seed: Seed, step: int) -> Tensor:
        """The pairs of the batch of `step`, int64 [B]."""
        group_MB, row = self.group(seed, step)
        return group_MB[row]

    def group_of(self, step: int) -> int:
        """The number of the group that `step` belongs to, from 0 over all epochs."""
        if self._chance is not None:
            return step // self.together
        steps = self.pairs // self.batch_size
        return step // steps * -(-steps // self.together) + step % steps // self.together

    def first_step(self, group: int) -> int:
        """The first step of that group."""
        if self._chance is not None:
            return group * self.together
        steps = self.pairs // self.batch_size
        epoch, place = divmod(group, -(-steps // self.together))
        return epoch * steps + place * self.together

    def cuts(self, first: int, last: int, parts: int) -> list[int]:
        """Where to cut the places [first, last) of a batch into at most `parts` parts: between lanes.

        Of data that are permuted as a whole, which have no lanes, anywhere. Returns the first place of each part, and
        `last`.
        """
        lane = self.batch_size // self.lanes
        unit = 1 if self.whole else lane if first % lane == last % lane == 0 else last - first
        number = (last - first) // unit
        parts = min(parts, number)
        return [first + number * part // parts * unit for part in range(parts + 1)]

    def _make_permutation(self, seed: Seed, epoch: int) -> Tensor:
        return torch.randperm(self.pairs, generator=Stream(("data order", seed, epoch)).generator())

    def _make_epoch(self, seed: Seed, epoch: int) -> _Epoch:
        generator = Stream(("data order", seed, epoch)).child("shards").generator()
        if self._chance is None:
            shards = torch.randperm(len(self.sizes), generator=generator).numpy()
        else:
            drawn = torch.rand(self._draws, dtype=torch.float64, generator=generator).numpy()
            shards = np.searchsorted(self._chance, drawn, side="right")
        end = np.concatenate([[0], np.cumsum(self.sizes[shards])])
        borders = [0]
        while borders[-1] < len(shards):
            wanted = int(np.searchsorted(end, end[borders[-1]] + self.window))
            borders.append(min(wanted, len(shards)))
        return _Epoch(shards, end, np.array(borders))

    def _make_window(self, seed: Seed, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The first pair of each block of a window, in their order, and the places in the epoch where they begin."""
        whole = self._epoch(seed, epoch)
        begin, stop = whole.borders[number], whole.borders[number + 1]
        shards = whole.shards[begin:stop]
        blocks = -(-self.sizes[shards] // BLOCK)
        skipped = BLOCK * (np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks))
        first = np.repeat(self.starts[shards], blocks) + skipped
        length = np.minimum(BLOCK, np.repeat(self.sizes[shards], blocks) - skipped)
        stream = Stream(("data order", seed, epoch)).child("blocks", number)
        shuffled = torch.randperm(len(first), generator=stream.generator()).numpy()
        return first[shuffled], whole.end[begin] + np.concatenate([[0], np.cumsum(length[shuffled])])

    def _sequence(self, seed: Seed, epoch: int, begin: int, stop: int) -> np.ndarray:
        """The pairs at the places [begin, stop) of an epoch; only the windows that they are in are computed."""
        whole = self._epoch(seed, epoch)
        windows = whole.end[whole.borders]
        parts = []
        for number in range(np.searchsorted(windows, begin, "right") - 1, np.searchsorted(windows, stop)):
            first, end = self._window(seed, epoch, int(number))
            places = np.arange(max(begin, end[0]), min(stop, end[-1]))
            block = np.searchsorted(end, places, side="right") - 1
            parts.append(first[block] + places - end[block])
        return np.concatenate(parts)

    def _drawn(self, seed: Seed, begin: int, stop: int) -> np.ndarray:
        """The pairs at the places [begin, stop) of the endless sequence of draws."""
        ends = self._ends.setdefault(seed, [0])
        while ends[-1] < stop:
            ends.append(ends[-1] + int(self._epoch(seed, len(ends) - 1).end[-1]))
        parts = []
        for epoch in range(int(np.searchsorted(ends, begin, "right")) - 1, int(np.searchsorted(ends, stop))):
            first, last = max(begin, ends[epoch]), min(stop, ends[epoch + 1])
            if first < last:
                parts.append(self._sequence(seed, epoch, first - ends[epoch], last - ends[epoch]))
        return np.concatenate(parts)

    def _make_group(self, seed: Seed, epoch: int, number: int) -> Tensor:
        """A group of an epoch, which leaves out the incomplete batch at its end, or of the endless draws."""
        share = self.batch_size // self.lanes
        begin, stop = number * self.together, (number + 1) * self.together
        if self._chance is None:
            stop = min(stop, self.pairs // self.batch_size)
            found = self._sequence(seed, epoch, begin * self.batch_size, stop * self.batch_size)
        else:
            found = self._drawn(seed, begin * self.batch_size, stop * self.batch_size)
        pairs = torch.from_numpy(found)
        stream = Stream(("data order", seed, epoch)).child("lanes", number)
        mixed = [
            lane[torch.randperm(len(lane), generator=stream.child(place).generator())]
            for place, lane in enumerate(pairs.view(self.lanes, -1))
        ]
        lanes_LMS = torch.stack(mixed).view(self.lanes, stop - begin, share)
        return lanes_LMS.transpose(0, 1).reshape(stop - begin, self.batch_size)


@dataclass(frozen=True)
class _Epoch:
    """The shards in the order of one epoch, the pairs before each and after all, the shards that begin a window."""

    shards: np.ndarray
    end: np.ndarray
    borders: np.ndarray


def lanes_of(batch_size: int) -> int:
    """The largest power of two up to LANES that divides the batch into lanes of at least BLOCK pairs, or 1."""
    lanes = 1
    while lanes < LANES and batch_size % (2 * lanes) == 0 and batch_size // (2 * lanes) >= BLOCK:
        lanes *= 2
    return lanes


def distinct(pairs: int, number: int, rng: Stream) -> Tensor:
    """`number` distinct pairs out of `pairs`, or all if there are fewer, in random order, int64."""
    if pairs <= WINDOW or number > pairs // 2:
        return torch.randperm(pairs, generator=rng.generator())[:number]
    drawn = torch.randint(pairs, (4 * number + 64,), generator=rng.generator()).numpy()  # no memory for all pairs
    _, first = np.unique(drawn, return_index=True)
    return torch.from_numpy(drawn[np.sort(first)[:number]])


def _chances(sizes: np.ndarray, source: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The cumulative chances with which one draw takes each shard.

    All shards of a source have one chance c, so that its pairs are drawn equally often; a pair is of source s with a
    probability in proportion to c_s * pairs_s, which is to be weight_s. So c_s = weight_s / pairs_s.
    """
    chance = np.ones(len(sizes))
    if len(weights):
        pairs = np.bincount(source, weights=sizes)
        if len(weights) != len(pairs) or not pairs.all():
            raise UserError(
                f"data.weights has {len(weights)} numbers, and the training shards are {len(pairs)} sources with "
                f"{', '.join(f'{int(each):,}' for each in pairs)} pairs: give one for each source of --data A::B."
            )
        chance = (np.asarray(weights, dtype=np.float64) / pairs)[source]
    cumulative = np.cumsum(chance)
    cumulative /= cumulative[-1]
    return cumulative
