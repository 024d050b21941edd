"""Training pairs decoded once: pixels and tokens of a whole data set as arrays on disk, mapped into memory.

    found = decoded(pairs)          # built into the cache at the first call, for data sets of at most 4 GiB
    found.images[index], found.texts(index, choose)

Reading a PNG and a caption costs more than a small model's step. The arrays are keyed by the shards' content, the
model's name and configuration and the versions of what decodes; several processes share them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from upcycle_bench.model.clip import Clip, model_config
from upcycle_bench.util.cache import build_once, cache_root, locked

VERSION = 1  # raise it when the same shards would give other arrays
LIMIT = 4 << 30  # bytes of images
CHUNK = 1024


class Readable(Protocol):
    """What is decoded: `pairs.PairDataset`, sample by sample."""

    captions: list[list[str]]
    clip: Clip

    def __len__(self) -> int: ...

    def read(self, sample: int) -> np.ndarray:
        """The image as the model wants it, uint8 [3, H, W]."""


@dataclass(frozen=True)
class Decoded:
    """images uint8 [N, 3, H, W]; tokens int32 [C, L] of all captions, sample n's being first[n] to first[n + 1]."""

    images: np.ndarray
    tokens: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def texts(self, index: np.ndarray, choose: Callable[[int, int], int]) -> Tensor:
        """One caption of each sample, int64 [b, L]; `choose(sample, number)` picks where there are several."""
        number = self.first[index + 1] - self.first[index]
        rows = self.first[index]
        for place in np.flatnonzero(number > 1):
            rows[place] += choose(int(index[place]), int(number[place]))
        return torch.from_numpy(self.tokens[rows].astype(np.int64))


def decoded(shards_digest: str, model: str, make: Callable[[], Readable]) -> Decoded | None:
    """The arrays of those shards as `model` wants them; None where they would exceed LIMIT.

    `make()` reads the shards and is called only if the cache has nothing.
    """
    versions = [metadata.version(name) for name in ("pillow", "torchvision", "open_clip_torch")]
    what = json.dumps([VERSION, shards_digest, model, model_config(model), versions], sort_keys=True)
    folder = cache_root() / "decoded" / hashlib.sha256(what.encode()).hexdigest()[:24]
    if not folder.is_dir():
        with locked(folder):  # two runs side by side would both do it
            if not folder.is_dir():
                pairs = make()
                if pairs.read(0).nbytes * len(pairs) > LIMIT:
                    return None
                build_once(folder, partial(_build, pairs=pairs))
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "tokens")}
    return Decoded(**arrays, first=np.load(folder / "first.npy"))


def _build(folder: Path, pairs: Readable) -> None:
    folder.mkdir()
    shape = (len(pairs), *pairs.read(0).shape)
    images = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    starts = range(0, len(pairs), CHUNK)
    workers = len(os.sched_getaffinity(0)) if len(pairs) > 4 * CHUNK else 0
    for start, part in zip(starts, DataLoader(_Chunks(pairs), batch_size=None, num_workers=workers), strict=True):
        images[start : start + len(part)] = part
    images.flush()
    number = {line: row for row, line in enumerate(dict.fromkeys(line for lines in pairs.captions for line in lines))}
    unique = list(number)
    tokens = torch.cat([pairs.clip.tokenize(unique[i : i + CHUNK]) for i in range(0, len(unique), CHUNK)])
    rows = [number[line] for lines in pairs.captions for line in lines]
    np.save(folder / "tokens.npy", tokens.numpy().astype(np.int32)[rows])
    np.save(folder / "first.npy", np.cumsum([0, *map(len, pairs.captions)]))


class _Chunks(Dataset[Any]):
    """Chunk number -> its images, for the data loader's workers."""

    def __init__(self, pairs: Readable) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return -(-len(self.pairs) // CHUNK)

    def __getitem__(self, chunk: int) -> np.ndarray:
        if chunk >= len(self):
            raise IndexError
        samples = range(chunk * CHUNK, min(len(self.pairs), (chunk + 1) * CHUNK))
        return np.stack([self.pairs.read(sample) for sample in samples])
