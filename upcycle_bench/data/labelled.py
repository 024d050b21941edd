"""Labelled images where they stand: an index of classification sets, read sample by sample when they are wanted.

    samples = index(root / "digits-test", "test")             # reads the shards' tables of contents and the labels
    some = samples.take(rows)
    for images_B3HW, label_B in some.batches(transform, 256): ...

Samples, their order, and what the transform is given are those of `evalsets.read` (tested), which decodes whole sets.

Shape suffixes: N samples, B batch.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upcycle_bench.data import evalset
from upcycle_bench.data.shards import open_image
from upcycle_bench.util.errors import UserError

SUFFIXES = ("webp", "png", "jpg", "jpeg")  # the first that a sample has is its image, as in CLIP_benchmark
REMEDY = "`upcycle-bench data check` says what else is wrong"


@dataclass(frozen=True)
class Labelled:
    """Samples in shards: `place_N3` int64 (number of the shard, offset of the image, its bytes), and their labels."""

    shards: tuple[Path, ...]
    place_N3: np.ndarray
    label_N: np.ndarray

    def __len__(self) -> int:
        return len(self.label_N)

    def take(self, rows: np.ndarray) -> Labelled:
        """Those samples, in that order."""
        return Labelled(self.shards, self.place_N3[rows], self.label_N[rows])

    def batches(self, transform: Callable[[Any], Tensor], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(transformed images, int64 labels), in order. Raises UserError for an image that cannot be read."""
        for start in range(0, len(self), batch_size):
            part = self.take(np.arange(start, min(start + batch_size, len(self))))
            images = [
                transform(open_image(self.shards[shard], offset, size, REMEDY))
                for shard, offset, size in part.place_N3.tolist()
            ]
            yield torch.stack(images), torch.from_numpy(part.label_N)


def index(folder: Path, split: str) -> Labelled:
    """All samples of a classification set; UserError for a set of another kind, or a sample without image or label."""
    if evalset.kind_of(folder) != "classification":
        raise UserError(f"evaluation set {folder.name}: it has captions, not labels; give a classification set.")
    shards = tuple(evalset.shards_of(folder, split))
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for number, shard in enumerate(shards):
        try:
            with tarfile.open(shard) as tar:
                for key, members in _samples(tar).items():
                    image = next((members[suffix] for suffix in SUFFIXES if suffix in members), None)
                    if image is None or "cls" not in members:
                        raise UserError(f"{shard}: sample {key} lacks its image or its .cls; {REMEDY}.")
                    content = tar.extractfile(members["cls"])
                    assert content is not None
                    places.append((number, image.offset_data, image.size))
                    labels.append(int(content.read()))
        except (tarfile.TarError, ValueError) as error:
            raise UserError(f"{shard}: not a shard of labelled images ({error}); copy the set again.") from None
    return Labelled(shards, np.array(places, dtype=np.int64).reshape(-1, 3), np.array(labels, dtype=np.int64))


def joined(parts: Sequence[Labelled], label_N: np.ndarray) -> Labelled:
    """The samples of several sets behind each other, with other labels."""
    starts = np.cumsum([0, *(len(part.shards) for part in parts)])
    places = [part.place_N3 + np.array([start, 0, 0]) for part, start in zip(parts, starts, strict=False)]
    return Labelled(tuple(shard for part in parts for shard in part.shards), np.concatenate(places), label_N)


def _samples(tar: tarfile.TarFile) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Members by sample (the name up to its first dot, as in webdataset) and lower-case suffix, in the tar's order."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        if member.isfile():
            folder, _, name = member.name.rpartition("/")
            key, _, suffix = name.partition(".")
            samples.setdefault(f"{folder}/{key}", {})[suffix.lower()] = member
    return samples
