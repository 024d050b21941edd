"""Shards for tests of the index, and how they are opened: each test has a cache of its own."""

from __future__ import annotations

import itertools
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_pair_index import PNG
from tests.data.test_shards import packed
from upcycle_bench.data import places
from upcycle_bench.data.index import BLOCK, Index
from upcycle_bench.data.open_index import open_index
from upcycle_bench.data.sources import expand_sources
from upcycle_bench.util.progress import Reporter

Sample = tuple[str, bytes, bytes]  # name, image, caption


TIMES = itertools.count(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "cache"))


def samples(count: int, shard: int = 0) -> list[Sample]:
    return [(f"{shard}-{n:03d}", PNG + bytes(n), f"caption {n} of {shard}".encode()) for n in range(count)]


def tar(found: list[Sample]) -> bytes:
    return packed(
        [file for name, image, text in found for file in ((f"{name}.png", image), (f"{name}.txt", text))],
        tarfile.USTAR_FORMAT,
    )


def write(folder: Path, *shards: list[Sample]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for number, found in enumerate(shards):
        (folder / f"{number:03d}.tar").write_bytes(tar(found))
    return folder


class Saying(Reporter):
    """Keeps the lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def opened(folder: Path | str, reporter: Reporter | None = None, **options: bool | float) -> Index:
    return open_index(expand_sources(str(folder)), "--data", reporter, **options)  # type: ignore[arg-type]


def content(index: Index, number: int) -> tuple[bytes, bytes]:
    """The files of a pair, read at the places of its row."""
    place, row = index.shards[int(index.shard_of(np.array([number]))[0])], index.rows[number]
    image = places.read(place, int(row["image"]) * BLOCK, int(row["image_bytes"]))
    return image, places.read(place, int(row["text"]) * BLOCK, int(row["text_bytes"]))


def changed(folder: Path, shard: int, found: list[Sample]) -> None:
    """Write a shard anew, as its owner mends it."""
    (path := folder / f"{shard:03d}.tar").write_bytes(tar(found))
    os.utime(path, (shard + 5, time.time()))
