"""Training pairs decoded once: pixels and tokens of a whole data set as arrays on disk, mapped into memory.

    arrays = decoded(shards_digest(shards), "lab-vit", lambda: pairs)    # None for more than 4 GiB of images
    arrays.images[index], arrays.texts(index, choose)

To decode a PNG and a caption costs more than a small model's training step. The cache keeps the arrays, which processes
share, under a hash of the shards' content, the model's configuration and the versions of the decoding packages.

A bad sample has a row of zeros, no caption, and a line in `bad.json`; arrays without that file have none. Where the
storage fails, which it may not the next time, no arrays are kept, and the shards are read instead.

Shape suffixes: N samples, S captions of all samples.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from upcycle_bench.data.bad_samples import PASSING, BadSample
from upcycle_bench.data.loading import load
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.config import model_config
from upcycle_bench.model.towers import image_size
from upcycle_bench.protocol import Captions
from upcycle_bench.util import strict_json
from upcycle_bench.util.cache import build_once, cache_root, locked
from upcycle_bench.util.environment import cores

VERSION = 1  # raise it when the same shards would give other arrays
LIMIT = 4 << 30  # bytes of images
CHUNK = 1024  # images that a worker decodes at a time


class _Unread(Exception):
    """A pair cannot be read for a reason that may pass; the text is a line."""


class Readable(Protocol):
    """Pairs that can be read sample by sample, such as `pairs.PairDataset`."""

    clip: Clip

    def __len__(self) -> int: ...

    def decode(self, number: int) -> tuple[np.ndarray, list[str]]:
        """The image at the model's resolution, uint8 [3, H, W], and its captions; BadSample."""


@dataclass(frozen=True)
class Decoded:
    """All pairs: `images` uint8 [N, 3, H, W], `tokens` int32 [S, L], `first` int64 [N + 1].

    The captions of sample n are the rows first[n] to first[n + 1] of `tokens`. `bad`: of bad samples, the arguments of
    their `BadSample`.
    """

    images: np.ndarray
    tokens: np.ndarray
    first: np.ndarray
    bad: Mapping[int, tuple[str, str, str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: np.ndarray) -> Tensor:
        """The images of the samples in `index` [B], uint8 [B, 3, H, W]."""
        return torch.from_numpy(self.images[index])

    def texts(self, index: np.ndarray, choose: Callable[[int, int], int]) -> Tensor:
        """One caption of each sample in `index` [B], int64 [B, L]. Of several, `choose(sample, number)` picks one."""
        number_B = self.first[index + 1] - self.first[index]
        row_B = self.first[index]
        for place in np.flatnonzero(number_B > 1):
            row_B[place] += choose(int(index[place]), int(number_B[place]))
        return torch.from_numpy(self.tokens[row_B].astype(np.int64))


def decoded(
    shards_digest: str,
    model: str,
    make: Callable[[], Readable],
    captions: Captions = "lines",
    preprocess: Mapping[str, Any] | None = None,
) -> Decoded | None:
    """The arrays of the shards for `model`, whose transforms have `preprocess`.

    None where the images exceed LIMIT, or some cannot be read now, of which a warning tells.
    `make()` opens the pairs, and is called only if the cache does not have the arrays. `captions`: what a .txt is.
    """
    versions = [metadata.version(name) for name in ("pillow", "torchvision", "open_clip_torch")]
    facts: list[Any] = [VERSION, shards_digest, model, model_config(model), versions]
    facts += [] if captions == "lines" else [captions]
    facts += [dict(preprocess)] if preprocess else []
    what = strict_json.dumps(facts, sort_keys=True)
    folder = cache_root() / "decoded" / hashlib.sha256(what.encode()).hexdigest()[:24]
    if not folder.is_dir():
        asked, unread = time.time(), cache_root() / "locks" / f"{folder.name}.unread"
        with locked(folder, "the decoded training images"):  # so that two runs side by side do not both decode
            if not folder.is_dir():
                if unread.exists() and unread.stat().st_mtime >= asked:
                    return None  # who had the lock has just tried
                pairs = make()
                if not fits(len(pairs), pairs.clip):
                    return None
                try:
                    build_once(folder, partial(_build, pairs=pairs))
                except _Unread as error:
                    unread.touch()
                    print(f"warning: {error}", file=sys.stderr, flush=True)
                    return None
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "tokens")}
    listed = folder / "bad.json"
    bad = strict_json.loads(listed.read_text()) if listed.is_file() else []
    return Decoded(
        **arrays, first=np.load(folder / "first.npy"), bad={number: (kind, why, key) for number, kind, why, key in bad}
    )


def fits(pairs: int, clip: Clip) -> bool:
    """Whether the images of so many pairs are at most LIMIT bytes."""
    return pairs * 3 * math.prod(image_size(clip.model)) <= LIMIT


def _build(folder: Path, pairs: Readable) -> None:
    folder.mkdir()
    shape = (len(pairs), 3, *image_size(pairs.clip.model))
    images = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    with (folder / "images.npy").open("r+b") as file:  # a full disk is an error here; in the mapped array it would kill
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    starts = range(0, len(pairs), CHUNK)
    workers = cores() if len(pairs) > 4 * CHUNK else 0

    def chunk(start: int) -> tuple[np.ndarray, list[list[str]], list[tuple[int, str, str, str]]]:
        pixels = np.zeros((min(CHUNK, len(pairs) - start), *shape[1:]), dtype=np.uint8)
        captions: list[list[str]] = [[] for _ in pixels]
        bad = []
        for row in range(len(pixels)):
            try:
                pixels[row], captions[row] = pairs.decode(start + row)
            except BadSample as error:
                bad.append((start + row, error.kind, error.why, error.key))
        return pixels, captions, bad

    captions, bad = [], []
    for start, (pixels, texts, worse) in zip(starts, load(chunk, starts, workers, "decoded images"), strict=True):
        images[start : start + len(pixels)] = pixels
        captions += texts
        bad += worse
        for pair, kind, why, _ in worse:
            if kind in PASSING:
                raise _Unread(
                    f"the training images are not decoded into the cache, since pair {pair:,} cannot be read now "
                    f"({BadSample(kind, why)}); the shards are read in each step."
                )
    images.flush()
    number = {line: row for row, line in enumerate(dict.fromkeys(line for lines in captions for line in lines))}
    unique = list(number)
    tokens = torch.cat([pairs.clip.tokenize(unique[i : i + CHUNK]) for i in range(0, len(unique), CHUNK)])
    rows = [number[line] for lines in captions for line in lines]
    np.save(folder / "tokens.npy", tokens.numpy().astype(np.int32)[rows])
    np.save(folder / "first.npy", np.cumsum([0, *map(len, captions)]))
    if bad:
        (folder / "bad.json").write_text(strict_json.dumps(bad))
