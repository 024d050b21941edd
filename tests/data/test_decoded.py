"""Decoded arrays: they give the same batches as the shards, and are built once for each content, if not too large."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.test_pairs import write_tar
from upcycle_bench.data import decoded as module
from upcycle_bench.data import pairs as pairs_module
from upcycle_bench.data.bad_samples import BadSample
from upcycle_bench.data.decoded import Decoded, decoded
from upcycle_bench.data.open_index import open_index
from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.data.shards import shards_digest
from upcycle_bench.data.sources import Sources
from upcycle_bench.model.clip import Clip, create_clip
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream


@pytest.fixture(scope="module")
def clip() -> Clip:
    return create_clip("smoke-vit")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the arrays are to be, in a cache that is empty."""
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded"


@pytest.fixture
def shards(tmp_path: Path, cache: Path) -> list[Path]:
    return [write_tar(tmp_path / "0.tar", 30), write_tar(tmp_path / "1.tar", 25, start=30)]


def from_shards(shards: list[Path], clip: Clip) -> PairDataset:
    """The same pairs, read from the shards each time."""
    pairs = PairDataset(shards, clip, keep_decoded=False)
    assert pairs.decoded is None
    return pairs


@pytest.mark.parametrize("chunk", [1024, 55, 20, 7])  # 7: more than four chunks, read by worker processes
def test_arrays_are_what_the_shards_hold(shards: list[Path], clip: Clip, monkeypatch: pytest.MonkeyPatch, chunk: int):
    monkeypatch.setattr(module, "CHUNK", chunk)
    slow = from_shards(shards, clip)
    found = PairDataset(shards, clip).decoded
    assert found is not None and len(found) == len(slow) == 55
    assert found.images.dtype == np.uint8 and found.tokens.dtype == np.int32
    for sample in range(55):
        assert np.array_equal(found.images[sample], slow.decode(sample)[0])
        rows = found.tokens[found.first[sample] : found.first[sample + 1]]
        assert np.array_equal(rows, clip.tokenize(slow.decode(sample)[1]).numpy())


def test_batches_are_the_same_with_several_captions_a_sample(shards: list[Path], clip: Clip):
    slow, fast = from_shards(shards, clip), PairDataset(shards, clip)
    assert fast.decoded is not None and len(fast) == len(slow)
    for step in (0, 4, 5, 23):
        for rank in range(2):
            a, b = slow.batch(3, step, 10, rank, 2), fast.batch(3, step, 10, rank, 2)
            assert torch.equal(a.images, b.images) and a.images.dtype == b.images.dtype
            assert torch.equal(a.texts, b.texts) and a.texts.dtype == b.texts.dtype
            assert torch.equal(a.index, b.index)
    a, b = (list(pairs.calibration(Stream(("c", 0)), 30, 8)) for pairs in (slow, fast))
    assert all(torch.equal(x.images, y.images) and torch.equal(x.texts, y.texts) for x, y in zip(a, b, strict=True))


def test_captions_are_chosen_among_a_sample_s_own():
    # sample 0 has rows 0 to 2, sample 1 row 3, sample 2 rows 4 and 5
    images, tokens = np.zeros((3, 3, 2, 2), dtype=np.uint8), np.arange(6, dtype=np.int32)[:, None]
    found = Decoded(images, tokens, np.array([0, 3, 4, 6]))
    asked = []

    def last(sample: int, number: int) -> int:
        asked.append((sample, number))
        return number - 1

    texts = found.texts(np.array([2, 1, 0, 2]), last)
    assert texts.dtype == torch.int64 and texts.flatten().tolist() == [5, 3, 2, 5]
    assert asked == [(2, 2), (0, 3), (2, 2)]  # not for sample 1, which has one
    assert found.first.tolist() == [0, 3, 4, 6]


def test_a_second_opening_builds_nothing(shards: list[Path], clip: Clip, cache: Path, monkeypatch: pytest.MonkeyPatch):
    first = PairDataset(shards, clip).batch(0, 0, 10)
    (folder,) = cache.iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(before) == {"images.npy", "tokens.npy", "first.npy"}
    monkeypatch.setattr(pairs_module, "open_index", lambda *_: pytest.fail("the shards were read again"))
    again = PairDataset(shards, clip).batch(0, 0, 10)
    assert torch.equal(first.images, again.images) and torch.equal(first.texts, again.texts)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_batch_can_be_written_to_without_harm(shards: list[Path], clip: Clip):
    pairs = PairDataset(shards, clip)
    batch = pairs.batch(0, 0, 10)
    batch.images.zero_()
    batch.texts.zero_()
    assert pairs.batch(0, 0, 10).images.any() and pairs.batch(0, 0, 10).texts.any()


def test_what_would_be_too_large_is_read_from_the_shards(
    shards: list[Path], clip: Clip, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    size = from_shards(shards, clip).decode(0)[0].nbytes * 55
    monkeypatch.setattr(module, "LIMIT", size - 1)
    pairs = PairDataset(shards, clip)
    assert pairs.decoded is None and len(pairs) == 55 and not cache.exists()
    monkeypatch.setattr(module, "LIMIT", size)
    assert PairDataset(shards, clip).decoded is not None
    assert decoded("other shards", clip.name, lambda: pairs) is not None


def test_augmented_pairs_are_never_decoded(shards: list[Path], clip: Clip, cache: Path):
    pairs = PairDataset(shards, clip, "random-resized-crop")
    pairs.batch(0, 0, 10)
    assert pairs.decoded is None and not cache.exists()


def test_the_key_follows_the_shards_the_model_and_pillow(
    tmp_path: Path, clip: Clip, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    shard = write_tar(tmp_path / "0.tar", 8)
    PairDataset([shard], clip)
    PairDataset([write_tar(tmp_path / "copy" / "0.tar", 8)], clip)  # the same content at another place
    assert len(list(cache.iterdir())) == 1
    write_tar(shard, 8, start=8)  # the same size, other pixels
    changed = PairDataset([shard], clip)
    assert len(list(cache.iterdir())) == 2
    pixels = from_shards([shard], clip)
    assert changed.decoded is not None and np.array_equal(changed.decoded.images[3], pixels.decode(3)[0])
    assert decoded("digest", "smoke-vit", lambda: pixels) is not None
    assert decoded("digest", "lab-vit", lambda: pixels) is not None
    assert len(list(cache.iterdir())) == 4
    monkeypatch.setattr(module.metadata, "version", lambda name: "0.0")
    assert decoded("digest", "smoke-vit", lambda: pixels) is not None
    assert len(list(cache.iterdir())) == 5


def test_the_key_follows_the_models_configuration(
    shards: list[Path], clip: Clip, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """A model of one's own may be changed under its old name, and want images of another size."""
    pairs = PairDataset(shards, clip)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr("open_clip.get_model_config", lambda name: {"vision_cfg": {"image_size": 12}})
    assert decoded(shards_digest(shards), clip.name, lambda: pairs) is not None
    assert len(list(cache.iterdir())) == 2


def test_a_worker_killed_while_it_decodes_is_one_line_and_leaves_nothing(
    shards: list[Path], clip: Clip, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    decode, here = PairDataset.decode, os.getpid()

    def killed(self: PairDataset, number: int) -> tuple[np.ndarray, list[str]]:
        if number == 30 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(self, number)

    monkeypatch.setattr(module, "CHUNK", 7)
    monkeypatch.setattr(module, "cores", lambda: 2)
    monkeypatch.setattr(PairDataset, "decode", killed)
    with pytest.raises(UserError, match="decoded images: a process that loads them was lost"):
        PairDataset(shards, clip)
    assert list(cache.iterdir()) == []


def test_text_captions_have_arrays_of_their_own(shards: list[Path], clip: Clip, cache: Path):
    lines, text = (PairDataset(shards, clip, captions=captions).decoded for captions in ("lines", "text"))
    assert lines is not None and text is not None and len(list(cache.iterdir())) == 2
    assert (len(lines.tokens), len(text.tokens)) == (110, 55)
    expected = clip.tokenize(["first 3 second 3"])[0].numpy()  # the tokenizer takes a line feed as a space
    assert np.array_equal(text.tokens[3], expected)


def indexed(shards: list[Path], clip: Clip) -> PairDataset:
    """A user's own data, which have an index."""
    return PairDataset(shards, clip, option="--data", index=open_index(Sources.of(shards)))


def test_arrays_of_an_index_follow_its_numbers_and_the_shards_times(tmp_path: Path, clip: Clip, cache: Path):
    """Not the two ends of the files, which are the same after a small change."""
    shard = write_tar(tmp_path / "0.tar", 8)
    os.utime(shard, (1, 1))
    first = indexed([shard], clip)
    indexed([shard], clip)
    assert len(list(cache.iterdir())) == 1
    index = first.index
    numbered = replace(index, rows=index.rows[::-1].copy())  # the same files, other numbers
    other = PairDataset([shard], clip, option="--data", index=numbered).decoded
    assert first.decoded is not None and other is not None
    assert np.array_equal(other.images, first.decoded.images[::-1]) and len(list(cache.iterdir())) == 2
    os.utime(shard, (2, 2))
    indexed([shard], clip)
    assert len(list(cache.iterdir())) == 3


def test_what_cannot_be_read_for_a_moment_is_not_kept(
    shards: list[Path], clip: Clip, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    decode = PairDataset.decode

    def failing(self: PairDataset, number: int) -> tuple[np.ndarray, list[str]]:
        if number == 30:
            raise BadSample("read error", "no answer")
        return decode(self, number)

    expected = from_shards(shards, clip).batch(0, 1, 10)
    monkeypatch.setattr(PairDataset, "decode", failing)
    pairs = PairDataset(shards, clip)
    assert pairs.decoded is None and list(cache.iterdir()) == []
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "since pair 30 cannot be read now (read error: no answer)" in said
    assert torch.equal(pairs.batch(0, 1, 10).images, expected.images)
    with monkeypatch.context() as another:  # a rank that waited meanwhile does not try all of it again
        another.setattr(module.time, "time", lambda: 0.0)
        assert PairDataset(shards, clip).decoded is None and capsys.readouterr().err == ""
    monkeypatch.undo()
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(cache.parent))
    assert PairDataset(shards, clip).decoded is not None
