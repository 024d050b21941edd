"""An index of classification sets: labels at once, images only when they are wanted.

    samples = index(root / "digits-test", "test")             # reads the shards' headers and the labels
    some = samples.take(rows)
    for images_B3HW, label_B in some.batches(transform, 256): ...

`evalset.read`, which decodes whole sets, gives the same samples in the same order (tested).

Shape suffixes: N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upcycle_bench.data import evalset
from upcycle_bench.data.evalset_samples import REMEDY
from upcycle_bench.data.shards import open_image
from upcycle_bench.util.errors import UserError


@dataclass(frozen=True)
class Labelled:
    """Samples in shards: `place_N3` int64 (shard number, offset of the image, its bytes) and `label_N` int64."""

    shards: tuple[Path, ...]
    place_N3: np.ndarray
    label_N: np.ndarray

    def __len__(self) -> int:
        return len(self.label_N)

    def take(self, rows: np.ndarray) -> Labelled:
        """The samples at `rows`, in that order."""
        return Labelled(self.shards, self.place_N3[rows], self.label_N[rows])

    def batches(self, transform: Callable[[Any], Tensor], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(transformed images [B, ...], int64 labels [B]), in order. UserError for an image that cannot be read."""
        for start in range(0, len(self), batch_size):
            part = self.take(np.arange(start, min(start + batch_size, len(self))))
            images = [
                transform(open_image(self.shards[shard], offset, size, REMEDY))
                for shard, offset, size in part.place_N3.tolist()
            ]
            yield torch.stack(images), torch.from_numpy(part.label_N)


def index(folder: Path, split: str) -> Labelled:
    """All samples of a split of a classification set; UserError for a set of another kind, or that is not valid."""
    if (kind := evalset.kind_of(folder)) != "classification":
        what = "captions, not labels" if kind == "retrieval" else "several labels an image"
        raise UserError(f"evaluation set {folder.name}: it has {what}; give a classification set.")
    shards = tuple(evalset.shards_of(folder, split))
    number = {shard: place for place, shard in enumerate(shards)}
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for sample in evalset.samples(folder, split):
        assert sample.member is not None
        places.append((number[sample.shard], sample.member.offset_data, sample.member.size))
        labels.append(sample.label)
    return Labelled(shards, np.array(places, dtype=np.int64).reshape(-1, 3), np.array(labels, dtype=np.int64))


def joined(parts: Sequence[Labelled], label_N: np.ndarray) -> Labelled:
    """The samples of several sets, one set after the other, with the labels `label_N`."""
    starts = np.cumsum([0, *(len(part.shards) for part in parts)])
    places = [part.place_N3 + np.array([start, 0, 0]) for part, start in zip(parts, starts, strict=False)]
    return Labelled(tuple(shard for part in parts for shard in part.shards), np.concatenate(places), label_N)
