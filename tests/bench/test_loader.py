"""The loader's bench, small and without its clock: both sides read the shards, and few bytes are read too many."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests.bench import loader
from upcycle_bench.model.clip import create_clip


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 4), (2, 2), (4, 4)])
def test_both_sides_read_the_same_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, workers: int
) -> None:
    monkeypatch.setattr(loader, "BATCH", 128)
    paths, clip = loader.write_shards(tmp_path, 400, per_shard=200), create_clip("smoke-vit")
    data = loader.ours(paths, clip, 400)
    read, samples, reads = loader.bytes_read(data, ranks, workers)
    assert 1 < read / samples <= 1.2 and 20_000 < samples / 384 < 30_000
    if ranks <= 2:  # as many as lanes: each block is read once, however many workers there are
        assert reads < 384 / 8
    if (ranks, workers) == (1, 1):
        (batch,) = itertools.islice(loader.our_batches(data), 1)
        images, texts = next(loader.their_batches(paths, clip, 400))
        assert len(images) == len(batch.images) == 128 and torch.equal(texts[0, :3], batch.texts[0, :3])
