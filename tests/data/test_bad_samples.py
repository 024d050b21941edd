"""Bad samples: each damage has its kind; another pair stands in the place, the same whatever reads it; not too many."""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from upcycle_bench.data import blocks, decoded, places
from upcycle_bench.data.bad_samples import KINDS, Bad, BadSample, Tally, captions_of, image_of, require_few
from upcycle_bench.data.batches import Batch, Loading
from upcycle_bench.data.pairs import ATTEMPTS, PairDataset, PickedBatches
from upcycle_bench.model.clip import Clip, create_clip
from upcycle_bench.protocol import Data
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

PAIRS = 40
LOCAL = Data(world="local", seed=0)


def picture(number: int, kind: str = "JPEG", **how: object) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **how)  # type: ignore[arg-type]
    return buffer.getvalue()


def file(image: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)  # type: ignore[arg-type]
    return buffer.getvalue()


def long_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("made", "x" * (2 << 20), zip=True)
    return info


GREY16 = np.array([[0, 255, 4000], [256, 65535, 9]], dtype=np.uint16)
# The files of a damaged pair, and its kind.
DAMAGE: dict[str, tuple[bytes, bytes, str]] = {
    "a truncated JPEG": (picture(1)[:-200], b"a", "truncated image"),
    "a truncated PNG": (picture(1, "PNG")[:-300], b"a", "truncated image"),
    "no byte": (b"", b"a", "no image (zeros)"),
    "zeros": (bytes(2000), b"a", "no image (zeros)"),
    "a web page": (b"<!DOCTYPE html><title>404</title>", b"a", "no image (HTML)"),
    "an error of a store": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', b"a", "no image (HTML)"),
    "text": (b"rate limit exceeded", b"a", "unreadable image"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", b"a", "unreadable image"),
    "gzip": (gzip.compress(picture(1)), b"a", "unreadable image"),
    "a bomb": (file(Image.new("1", (14_000, 14_000))), b"a", "too many pixels"),
    "a long text": (file(Image.new("RGB", (6, 6)), pnginfo=long_text()), b"a", "unreadable image"),
    "16 bits": (file(Image.fromarray(GREY16)), b"a", "more than 8 bits"),
    "a line": (file(Image.new("RGB", (1, 60_000))), b"a", "odd shape"),
    "Latin-1": (picture(1), "é".encode("latin-1"), "not UTF-8"),
    "UTF-16": (picture(1), "a".encode("utf-16"), "not UTF-8"),
    "no caption": (picture(1), b" \r\n", "empty caption"),
}


def shard(path: Path, changed: dict[int, tuple[bytes, bytes]] | None = None, start: int = 0) -> Path:
    """PAIRS pairs, some of which have other files."""
    with tarfile.open(path, "w") as tar:
        for number in range(start, start + PAIRS):
            image, text = (changed or {}).get(number, (picture(number), b"one %d\ntwo %d" % (number, number)))
            for suffix, content in (("jpg", image), ("txt", text)):
                info = tarfile.TarInfo(f"{number:05}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def clip() -> Clip:
    return create_clip("smoke-vit")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "texts", "index"))


@pytest.mark.parametrize(("image", "text", "kind"), DAMAGE.values(), ids=DAMAGE)
def test_every_damage_has_its_kind(image: bytes, text: bytes, kind: str) -> None:
    with pytest.raises(BadSample) as caught:
        _ = image_of(image), captions_of(text, "text")
    assert caught.value.kind == kind and kind in KINDS


def test_a_sound_pair_is_no_damage() -> None:
    assert image_of(picture(3)).size == (24, 24)
    assert captions_of(b"a\xe2\x80\xa8b\n", "lines") == ["a\u2028b"]


@pytest.mark.parametrize("damage", ["a truncated JPEG", "zeros", "a web page", "a bomb"])
@pytest.mark.parametrize("augmentation", ["none", "random-resized-crop"])
def test_a_bad_sample_is_replaced_and_no_other_place_changes(
    tmp_path: Path, clip: Clip, damage: str, augmentation: str
) -> None:
    image, text, kind = DAMAGE[damage]
    sound = PairDataset([shard(tmp_path / "0.tar")], clip, augmentation, keep_decoded=False)
    whole = sound.batch(0, 3, PAIRS)
    pairs = PairDataset([shard(tmp_path / "0.tar", {7: (image, text)})], clip, augmentation, keep_decoded=False)
    batch = pairs.batch(0, 3, PAIRS)
    assert batch.bad == (Bad(7, kind, "0.tar", "00007"),)
    place = whole.index.tolist().index(7)
    others = torch.arange(PAIRS) != place
    assert torch.equal(batch.images[others], whole.images[others])
    assert torch.equal(batch.texts[others], whole.texts[others])
    number = Stream(("augmentation", 0, 3)).child("replacement", 7, 0).seed() % PAIRS
    assert batch.index[place] == number != 7  # the rule, by hand


def test_the_replacement_depends_on_seed_step_and_pair_alone(tmp_path: Path, clip: Clip) -> None:
    """Not on the ranks, the processes, the other pairs that are bad, or what was read before."""
    pair = DAMAGE["a truncated JPEG"][:2]
    one = PairDataset([shard(tmp_path / "0.tar", {7: pair})], clip, keep_decoded=False)
    more = PairDataset([shard(tmp_path / "1.tar", {7: pair, 20: pair})], clip, keep_decoded=False)
    places = {}
    for step in range(6):
        whole = one.batch("a", step, PAIRS)
        parts = [one.batch("a", step, PAIRS, rank, 4) for rank in range(4)]
        assert torch.equal(torch.cat([part.index for part in parts]), whole.index)
        assert sum((part.bad for part in parts), ()) == whole.bad
        place = one.order(PAIRS).batch("a", step).tolist().index(7)
        places[step] = int(whole.index[place])
        if places[step] != 20:
            assert more.batch("a", step, PAIRS).index[place] == places[step]
    assert len(set(places.values())) > 2


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_workers_hand_bad_samples_along_and_change_no_bit(tmp_path: Path, clip: Clip, workers: int) -> None:
    """Of data in blocks: two lanes of 64, in one to three processes."""
    paths = [shard(tmp_path / f"{n}.tar", {PAIRS * n + 7: DAMAGE["zeros"][:2]}, PAIRS * n) for n in range(10)]
    settings = LOCAL.model_copy(update={"window": 100})
    alone = PairDataset(paths, clip, "random-resized-crop", settings=settings)
    expected = [alone.batch("a", step, 128, 1, 2) for step in range(2, 5)]
    pairs = PairDataset(paths, clip, "random-resized-crop", settings=settings, loading=Loading(workers, prefetch=1))
    found = list(pairs.batches("a", 2, 5, 128, 1, 2))
    assert all(same(a, b) and a.bad == b.bad for a, b in zip(found, expected, strict=True))
    assert sum(len(batch.bad) for batch in found) > 0


def test_workers_take_turns_by_groups(tmp_path: Path, clip: Clip) -> None:
    """Rank 1 has one lane: each of three workers makes all of a group of 16 steps, with the bits of one process."""
    paths = [shard(tmp_path / f"{n}.tar", start=PAIRS * n) for n in range(60)]
    settings = LOCAL.model_copy(update={"window": 400})
    made = tmp_path / "made"
    made.mkdir()

    class Noted(PairDataset):
        def part(self, seed: int | str, step: int, batch_size: int, first: int, last: int) -> Batch:
            (made / f"{step}-{os.getpid()}").touch()
            return super().part(seed, step, batch_size, first, last)

    pairs = Noted(paths, clip, captions="text", settings=settings, loading=Loading(3), keep_decoded=False)
    found = list(pairs.batches("a", 3, 40, 128, 1, 2))
    places = [path.name.split("-") for path in made.iterdir()]
    assert len(places) == 37
    who = {int(step): process for step, process in places}
    groups = [pairs.group_of(128, step) for step in range(3, 40)]
    assert len(set(groups)) > 3 and {(group % 3, who[step]) for step, group in enumerate(groups, 3)} == {
        (group % 3, who[3 + groups.index(group)]) for group in set(groups)
    }
    assert len(set(who.values())) == 3
    alone = PairDataset(paths, clip, captions="text", settings=settings, keep_decoded=False)
    assert all(same(batch, alone.batch("a", step, 128, 1, 2)) for step, batch in enumerate(found, 3))


@pytest.mark.parametrize("turns", [1, 3])
def test_the_next_group_of_a_process_is_read_ahead_and_nothing_twice(tmp_path: Path, clip: Clip, turns: int) -> None:
    """Over the end of an epoch; from step `stop` on nothing is read."""
    paths = [shard(tmp_path / f"{n}.tar", start=PAIRS * n) for n in range(60)]
    settings = LOCAL.model_copy(update={"window": 400})
    pairs = PairDataset(paths, clip, captions="text", settings=settings, keep_decoded=False)
    pairs.turns, pairs.stop = turns, 70
    expected: list[list[list[int]]] = []
    expect = pairs.reader.expect

    def noted(*numbers: np.ndarray) -> None:
        expected.append([each.tolist() for each in numbers])
        expect(*numbers)

    pairs.reader.expect = noted  # type: ignore[method-assign]
    for step in range(70):
        if pairs.group_of(128, step) % turns == 0:
            pairs.part("a", step, 128, 0, 128)
    assert len(expected) > 2 and [each[1:] for each in expected] == [[each[0]] for each in expected[1:]] + [[]]
    spans = [span for each in expected for span in set(map(id, pairs.reader._joined(np.array(each[0])).values()))]
    assert pairs.reader.reads == len(spans)


def test_decoded_arrays_give_the_same_batches(tmp_path: Path, clip: Clip) -> None:
    path = shard(tmp_path / "0.tar", {7: DAMAGE["a web page"][:2], 30: DAMAGE["a truncated JPEG"][:2]})
    slow = PairDataset([path], clip, keep_decoded=False)
    for _ in range(2):  # decoded now, then found in the cache
        fast = PairDataset([path], clip)
        assert fast.decoded is not None and sorted(fast.decoded.bad) == [7, 30]
        for step in range(3):
            a, b = slow.batch("a", step, PAIRS), fast.batch("a", step, PAIRS)
            assert same(a, b) and a.bad == b.bad and len(a.bad) >= 2


def test_arrays_of_earlier_versions_have_no_bad_sample(tmp_path: Path, clip: Clip, cache: Path) -> None:
    PairDataset([shard(tmp_path / "0.tar")], clip)
    (folder,) = (cache / "decoded").iterdir()
    assert not (folder / "bad.json").exists()  # as they were written before
    assert decoded.VERSION == 1


@pytest.mark.parametrize("keep_decoded", [False, True])
def test_to_list_a_pair_changes_no_batch(tmp_path: Path, clip: Clip, keep_decoded: bool) -> None:
    """It is replaced by the same rule, without being read, and counts as before."""
    path = shard(tmp_path / "0.tar", {7: DAMAGE["zeros"][:2], 9: DAMAGE["zeros"][:2]})
    pairs, listing = (
        PairDataset([path], clip, captions="text", option="--data", keep_decoded=keep_decoded) for _ in range(2)
    )
    listing.index = replace(listing.index, bad={7: "no image (zeros)"})
    for step in range(4):
        a, b = pairs.batch(0, step, PAIRS), listing.batch(0, step, PAIRS)
        assert same(a, b)
        assert {bad.number for bad in a.bad} == {7, 9}
        assert [(bad.number, bad.kind) for bad in a.bad] == [(bad.number, bad.kind) for bad in b.bad]


def test_a_mended_pair_that_is_listed_stays_replaced(tmp_path: Path, clip: Clip) -> None:
    broken, whole = (shard(tmp_path / f"{n}.tar", changed) for n, changed in enumerate([{7: DAMAGE["zeros"][:2]}, {}]))
    before = PairDataset([broken], clip, keep_decoded=False).batch(0, 1, PAIRS)
    mended = PairDataset([whole], clip, keep_decoded=False)
    mended.index = replace(mended.index, bad={7: "no image (zeros)"})
    assert same(mended.batch(0, 1, PAIRS), before)


def test_where_nothing_can_be_used_it_is_one_line(tmp_path: Path, clip: Clip) -> None:
    path = shard(tmp_path / "0.tar", dict.fromkeys(range(PAIRS), DAMAGE["a web page"][:2]))
    pairs = PairDataset([path], clip, option="--data", keep_decoded=False)
    line = rf"^--data: none of {ATTEMPTS} pairs that were drawn can be used \(the last: no image \(HTML\) at 0\.tar: "
    with pytest.raises(UserError, match=line):
        pairs.batch(0, 0, 4)
    pairs.index = replace(pairs.index, bad=dict.fromkeys(range(PAIRS), "no image (HTML)"))
    del pairs.listed
    with pytest.raises(UserError, match=r"the last: no image \(HTML\) at 0\.tar\)"):
        pairs.batch(0, 0, 4)


def test_calibration_and_chosen_batches_replace_by_their_own_stream(tmp_path: Path, clip: Clip) -> None:
    settings = LOCAL.model_copy(update={"bad_samples": 0.1})
    path = shard(tmp_path / "0.tar", {7: DAMAGE["zeros"][:2]})
    pairs = PairDataset([path], clip, keep_decoded=False, settings=settings)
    first, again = (list(pairs.calibration(Stream(("c", 0)), PAIRS, 16)) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert sum(len(batch.bad) for batch in first) == 1 and not any(7 in batch.index for batch in first)
    picked = PickedBatches(pairs, torch.tensor([[7, 8], [7, 8]]))
    assert [int(picked.batch(0, step, 2).index[0]) for step in range(2)] == [
        Stream(("augmentation", 0, step)).child("replacement", 7, 0).seed() % PAIRS for step in range(2)
    ]
    with pytest.raises(UserError, match="5 of 10 samples are bad"):
        picked.judge({"no image (zeros)": 5}, {"no image (zeros)": "0.tar: 00007"}, 10)


@pytest.mark.parametrize(("cut", "kinds"), [(0.5, {"cut shard"}), (0.0, {"cut shard"}), (None, {"changed shard"})])
def test_a_shard_that_is_cut_or_replaced_meanwhile_is_bad_samples(
    tmp_path: Path, clip: Clip, cut: float | None, kinds: set[str]
) -> None:
    paths = [shard(tmp_path / "0.tar"), shard(tmp_path / "1.tar", start=PAIRS)]
    pairs = PairDataset(paths, clip, keep_decoded=False)
    content = paths[1].read_bytes()
    paths[1].write_bytes(content[: int(len(content) * cut)] if cut is not None else content[512:] + bytes(512))
    batch = pairs.batch(0, 0, 2 * PAIRS)
    assert {bad.kind for bad in batch.bad} == kinds and {bad.shard for bad in batch.bad} == {"1.tar"}
    assert len({bad.number for bad in batch.bad}) >= 0.4 * PAIRS


def test_a_read_error_is_a_bad_sample(tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = PairDataset([shard(tmp_path / "0.tar")], clip, keep_decoded=False)
    place, read = int(pairs.index.rows[7]["image"]) * 512, places.read

    def broken(path: str, offset: int, size: int) -> bytes:
        if offset <= place < offset + size:
            raise OSError(5, "Input/output error")
        return read(path, offset, size)

    monkeypatch.setattr(blocks, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(places, "read", broken)
    assert pairs.batch(0, 0, PAIRS).bad == (Bad(7, "read error", "0.tar", ""),)


def test_the_bound_is_a_share_of_what_was_read() -> None:
    tally = Tally()
    tally.add([Bad(n, "truncated image", f"{n}.tar", "a") for n in range(100)])
    tally.add([Bad(3, "not UTF-8", "3.tar", "b")])
    ask: Callable[..., None] = partial(require_few, tally.kinds, tally.first, where="--data")
    ask(read=10_100, pairs=10**6, bound=0.01)
    ask(read=512, pairs=10**6, bound=0.0101)  # at first, ten thousand count as read
    line = (
        "--data: 101 of 5,000 samples are bad, more than data.bad_samples=0.01 of them; most often truncated image "
        "(100, the first is 0.tar: a): see `upcycle-bench data check SHARDS --list`, or --set data.bad_samples=0.05."
    )
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        ask(read=5_000, pairs=10**6, bound=0.01)
    with pytest.raises(UserError):
        ask(read=512, pairs=2_000, bound=0.05)  # of few pairs, all
    with pytest.raises(UserError):
        ask(read=10**9, pairs=10**9, bound=0.0)
    require_few({}, {}, read=0, pairs=5, bound=0.0, where="")
