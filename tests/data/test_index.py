"""The index on disk: rows, identity, bad pairs, mended shards, builds that are interrupted or go on side by side."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.test_pair_index import PNG
from tests.data.test_shards import packed
from upcycle_bench.data import bad_list, packed_index, places, repacking, shard_cache, shard_index
from upcycle_bench.data import open_index as opening
from upcycle_bench.data.bad_list import list_bad, path_of, read_bad
from upcycle_bench.data.bad_samples import Bad, BadSample
from upcycle_bench.data.blocks import Reader
from upcycle_bench.data.index import BLOCK, NOWHERE, ROW, Index
from upcycle_bench.data.mended import aligned, first_missing, left_of
from upcycle_bench.data.open_index import open_index
from upcycle_bench.data.sources import expand_sources
from upcycle_bench.data.training_pairs import _Listing
from upcycle_bench.util.errors import UserError
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


def slow(path: Path) -> list[tuple[int, int, int, int, int]]:
    """The rows of a shard by tarfile, one sample after the other."""
    files: dict[str, dict[str, tarfile.TarInfo]] = {}
    texts: dict[str, bytes] = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            stem, _, suffix = member.name.partition(".")
            if suffix.lower() not in files.setdefault(stem, {}):
                files[stem][suffix.lower()] = member
                if suffix.lower() == "txt":
                    texts[stem] = archive.extractfile(member).read()  # type: ignore[union-attr]
    rows = []
    for stem, members in files.items():
        image = next((members[suffix] for suffix in ("png", "jpg", "jpeg", "webp") if suffix in members), None)
        if image is not None and texts.get(stem, b"").strip():
            check = zlib.crc32(stem.encode() + texts[stem]) & 0xFFFF
            text = members["txt"]
            rows.append((image.offset_data // 512, image.size, text.offset_data // 512, text.size, check))
    return rows


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.text("abcé-_ ", min_size=1, max_size=120),
            st.dictionaries(
                st.sampled_from(["png", "JPG", "webp", "txt", "TXT", "json"]), st.binary(max_size=1100), max_size=4
            ),
            st.sampled_from(["", " \n", "a cat", "ein Kätzchen\nzwei", "x" * 3000]),
        ),
        max_size=12,
        unique_by=lambda each: each[0].strip(),
    ),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_rows_are_those_of_a_slow_reading(
    tmp_path: Path, found: list[tuple[str, dict[str, bytes], str]], form: int
) -> None:
    files = [("first.png", PNG), ("first.txt", b"good")]
    for number, (name, contents, text) in enumerate(found):
        given = {suffix: text.encode() if suffix.lower() == "txt" else data for suffix, data in contents.items()}
        files += [(f"{number}{name.strip()}.{suffix}", data) for suffix, data in given.items()]
    try:
        (path := tmp_path / "0.tar").write_bytes(packed(files, form))
    except ValueError:  # ustar has no room for the name
        return
    os.utime(path, ns=(0, next(TIMES)))  # faster than a file system's clock
    assert opened(path, fresh=True).rows.tolist() == slow(path)


def test_pairs_are_numbered_over_shards_and_sources(tmp_path: Path) -> None:
    write(tmp_path / "a", samples(3), [], samples(2, 2)), write(tmp_path / "b", samples(4, 5))
    index = opened(f"{tmp_path}/a::{tmp_path}/b")
    assert (len(index), index.starts.tolist(), index.source) == (9, [0, 3, 3, 5, 9], (0, 0, 0, 1))
    assert index.shard_of(np.arange(9)).tolist() == [0, 0, 0, 2, 2, 3, 3, 3, 3]
    expected = [*samples(3), *samples(2, 2), *samples(4, 5)]
    assert [content(index, number) for number in range(9)] == [(image, text) for _, image, text in expected]


def test_a_start_opens_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "a", samples(3), samples(2, 1))
    first = opened(folder)
    monkeypatch.setattr("upcycle_bench.data.pair_index.open_shard", lambda *_: pytest.fail("a shard was read"))
    monkeypatch.setattr(shard_index, "read", lambda *_: pytest.fail("all was packed again"))
    again = opened(folder)
    assert again.identity == first.identity and again.rows.tolist() == first.rows.tolist()
    assert isinstance(again.rows, np.memmap)


def test_what_the_identity_is_of(tmp_path: Path) -> None:
    first = opened(write(tmp_path / "a", samples(3), samples(2, 1))).identity
    moved = write(tmp_path / "elsewhere" / "b", samples(3), samples(2, 1))
    os.utime(moved / "000.tar", (1, 1))
    assert opened(moved).identity == first
    name, image, text = samples(3)[1]
    others: list[list[list[Sample]]] = [
        [[samples(3)[0], (name, image, text + b"!"), samples(3)[2]], samples(2, 1)],  # another caption
        [[samples(3)[0], (name + "x", image, text), samples(3)[2]], samples(2, 1)],  # name
        [[samples(3)[0], (name, image + b"1", text), samples(3)[2]], samples(2, 1)],  # size of an image
        [[*samples(3)[1:], samples(3)[0]], samples(2, 1)],  # order of samples
        [samples(2, 1), samples(3)],  # order of shards
        [samples(3), samples(2, 1), samples(1, 2)],
    ]
    found = {opened(write(tmp_path / f"other{n}", *shards)).identity for n, shards in enumerate(others)}
    assert len(found) == len(others) and first not in found
    (moved / "000.tar").rename(moved / "00.tar")
    assert opened(moved).identity != first


def changed(folder: Path, shard: int, found: list[Sample]) -> None:
    """Write a shard anew, as its owner mends it."""
    (path := folder / f"{shard:03d}.tar").write_bytes(tar(found))
    os.utime(path, (shard + 5, time.time()))


def test_a_listed_pair_is_mended_or_removed_and_the_identity_stays(tmp_path: Path) -> None:
    good = samples(4, 1)
    broken = [*good[:2], ("1-002", b"<html>", b"other"), good[3]]
    folder = write(tmp_path / "a", samples(3), broken)
    first = opened(folder)
    assert list_bad(first, [(5, "no image (HTML)", "1-002"), (5, "again", "")]) == 1
    assert list_bad(first, [(5, "no image (HTML)", "1-002")]) == 0
    assert opened(folder).bad == {5: "no image (HTML)"}
    for mend in (good, [*good[:2], good[3]], [*good[:2], ("new", PNG, b"new"), *good[2:]], broken):
        changed(folder, 1, mend)
        said = Saying()
        index = opened(folder, said)
        assert (index.identity, index.bad, len(index)) == (first.identity, {5: "no image (HTML)"}, 7)
        for number in (0, 3, 4, 6):  # each good pair is read where it is now
            assert content(index, number) == content(first, number) if number < 3 else good[number - 3][1:]
        unused = len(mend) - 3 if mend is not broken else 0  # what was indexed at first is nothing to tell
        assert len(said.lines) == bool(unused)
        if unused:
            assert f"001.tar: the shard has changed; its pairs keep their numbers, and {unused} new" in said.lines[0]
    fresh = opened(folder, fresh=True)
    assert fresh.identity == first.identity  # the broken one again, numbered as it is
    changed(folder, 1, good)
    fresh = opened(folder, fresh=True)
    assert fresh.identity != first.identity and not fresh.bad


def test_another_pair_in_a_changed_shard_is_another_data_set(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", samples(3), samples(4, 1))
    first = opened(folder)
    changed(folder, 1, [*samples(2, 1), ("1-002", PNG + bytes(2), b"another caption"), samples(4, 1)[3]])
    said = Saying()
    index = opened(folder, said)
    assert index.identity != first.identity
    (line,) = said.lines
    assert line.startswith(
        f"--data {folder / '001.tar'}: the shard has changed, and pair 2 of it (now 1-002.png) is not"
    )
    assert content(index, 5)[1] == b"another caption"
    changed(folder, 0, samples(2))  # one is gone
    assert len(opened(folder)) == 6


@pytest.mark.parametrize("damage", [tar(samples(4, 1))[:5000], b"", b"<html>log in</html>", b"\x1f\x8b" + bytes(9000)])
def test_a_shard_that_is_damaged_for_a_moment_keeps_numbers_and_identity(tmp_path: Path, damage: bytes) -> None:
    folder = write(tmp_path / "a", samples(4), samples(4, 1), samples(4, 2))
    first, whole = opened(folder), (folder / "001.tar").read_bytes()
    list_bad(first, [(4, "kind", "")])
    there = 2 if len(damage) == 5000 else 0
    (folder / "001.tar").write_bytes(damage)
    said = Saying()
    cut = opened(folder, said, bad_samples=0.9)
    assert (cut.identity, len(cut), cut.starts.tolist()) == (first.identity, 12, first.starts.tolist())
    gone = 4 - max(there, 1)  # one of those that are not there is listed
    assert sum(cut.left_out.values()) == gone
    (line,) = said.lines
    assert line.startswith(f"--data {folder / '001.tar'}: the shard is no longer whole; its pairs keep their numbers")
    assert f"{gone} are lost until it is put back: it is" in line
    reader = Reader(cut)
    reader.expect(np.arange(12))
    for number in [0, 3, *range(5, 4 + there), 8, 11]:
        assert reader.read(number).image == content(first if number < 4 else cut, number)[0]
    for number in range(4 + max(there, 1), 8):
        with pytest.raises(BadSample, match="cut shard"):
            reader.read(number)
    with pytest.raises(UserError, match=r"001\.tar: it is"):
        opened(folder, bad_samples=0.01)
    (folder / "001.tar").write_bytes(whole)
    os.utime(folder / "001.tar", (9, 9))
    said = Saying()
    again = opened(folder, said)
    assert (again.identity, again.left_out, said.lines) == (first.identity, {}, [])
    assert again.rows.tolist() == first.rows.tolist()


def test_a_damaged_shard_of_other_pairs_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", samples(4), samples(4, 1))
    first, whole = opened(folder), (folder / "001.tar").read_bytes()
    (folder / "001.tar").write_bytes(tar(samples(4, 7))[:5000])
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"001\.tar: the shard has changed and is not whole: it is cut at byte 5,000"
        ):
            opened(folder, bad_samples=0.9)
    (folder / "001.tar").write_bytes(whole)
    os.utime(folder / "001.tar", (9, 9))
    assert opened(folder).identity == first.identity


def test_a_data_set_is_taken_back_with_its_shards(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", samples(3), samples(4, 1))
    first = opened(folder)
    identities = set()
    for other in (samples(2, 1), samples(5, 7), samples(2, 1)):
        changed(folder, 1, other)
        identities.add(opened(folder).identity)
        changed(folder, 1, [*samples(4, 1)])
        said = Saying()
        back = opened(folder, said)
        assert back.identity == first.identity and back.rows.tolist() == first.rows.tolist()
        assert "these shards hold what was indexed before; its runs go on, 7 pairs" in said.lines[0]
    assert len(identities) == 2 and first.identity not in identities
    changed(folder, 1, [*samples(4, 1), ("new", PNG, b"new")])  # aligned with it, not the same
    assert opened(folder).identity == first.identity


def test_of_many_data_sets_that_shards_were_the_last_stay(tmp_path: Path) -> None:
    """The rows of each may be large."""
    folder = write(tmp_path / "a", samples(3), samples(4, 1))
    identities = [opened(folder).identity]
    for number in range(2, 7):
        changed(folder, 1, samples(4, number))
        identities.append(opened(folder).identity)
    assert len(set(identities)) == 6
    assert len(list((tmp_path / "cache" / "index").glob("*.rows"))) == 1 + packed_index.KEPT
    for number, identity in ((5, identities[4]), (6, identities[5])):
        changed(folder, 1, samples(4, number))
        said = Saying()
        assert opened(folder, said).identity == identity and "what was indexed before" in said.lines[0]


def test_new_times_of_the_same_bytes_align_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "a", samples(3), samples(4, 1))
    first = opened(folder)
    for path in folder.iterdir():
        os.utime(path, (7, 7))
    monkeypatch.setattr(repacking, "aligned", lambda *_: pytest.fail("what is the same was aligned"))
    assert opened(folder).identity == first.identity


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=8, unique=True), st.data())
def test_what_is_left_of_a_shard(old: list[int], data: st.DataObject) -> None:
    rows = np.array([(100 + n, size, 0, 0, 0) for n, size in enumerate(old)], ROW)
    there = [size for size in old if data.draw(st.booleans())]
    new = np.array([(200 + n, size, 0, 0, 0) for n, size in enumerate(there)], ROW)
    found = left_of(rows, set(), new)
    assert found is not None and found["image_bytes"].tolist() == old
    assert found["image"].tolist() == [200 + there.index(size) if size in there else NOWHERE for size in old]
    other = np.concatenate([new, np.array([(1, 9, 0, 0, 0)], ROW)])
    assert left_of(rows, set(), other) is None
    if old and old[0] not in there:  # a listed pair may be mended in the same shard
        wanted = left_of(rows, {0}, other)
        assert wanted is not None and wanted["image"][0] == 100


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8), st.sets(st.integers(0, 7)))
def test_alignment_is_that_of_all_subsequences(old: list[int], new: list[int], listed: set[int]) -> None:
    def rows(sizes: list[int], place: int) -> np.ndarray:
        return np.array([(place + n, size, 0, 0, 0) for n, size in enumerate(sizes)], ROW)

    wanted = [size for row, size in enumerate(old) if row not in listed]
    possible = any(list(part) == wanted for part in itertools.combinations(new, len(wanted)))
    found = aligned(rows(old, 100), listed, rows(new, 200))
    assert (found is not None) == possible == (first_missing(rows(old, 100), listed, rows(new, 200)) is None)
    if found is not None:
        assert found["image_bytes"].tolist() == old
        kept = [row for row in range(len(old)) if row not in listed]
        assert all(new[found["image"][row] - 200] == old[row] for row in kept)
        assert (np.diff(found["image"][kept].astype(int)) > 0).all()
        assert all(found["image"][row] == 100 + row for row in range(len(old)) if row in listed)


FAULTS: dict[str, tuple[bytes, str, int, str]] = {
    "cut": (tar(samples(4, 9))[:5000], "cut shard", 2, "it is cut at byte 5,000, within a file, after 2 whole samples"),
    "gzip": (b"\x1f\x8b" + bytes(600), "no archive", 0, "it is compressed with gzip"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\n", "no archive", 0, "it is a Git LFS pointer"),
    "HTML": (b"<html>log in</html>", "no archive", 0, "it is a web page"),
    "empty": (b"", "no archive", 0, "it is empty"),
    "apart": (
        packed([("0.png", PNG), ("1.png", PNG), ("0.txt", b"a")]),
        "unordered shard",
        0,
        "the files of sample '0' do not stand side by side",
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_shard_that_is_not_whole_is_counted_below_the_bound_and_named_above(tmp_path: Path, kind: str) -> None:
    data, name, whole, why = FAULTS[kind]
    folder = write(tmp_path / "a", samples(4), samples(4, 1), samples(4, 2))
    (folder / "001.tar").write_bytes(data)
    lost = 4 - whole
    index = opened(folder, bad_samples=lost / 12)
    assert (index.left_out, len(index)) == ({name: lost}, 8 + whole)
    with pytest.raises(UserError) as caught:
        opened(folder, bad_samples=lost / 12 - 0.01)
    assert str(caught.value).startswith(f"--data {folder / '001.tar'}: {why}")
    changed(folder, 1, samples(4, 9) if kind == "cut" else samples(4, 1))  # mended: what was there keeps its number
    said = Saying()
    mended = opened(folder, said)
    assert (mended.identity, len(mended), mended.left_out) == (index.identity, 8 + whole, {})
    assert f"{lost} new or listed ones are not used" in said.lines[0]


def test_without_a_whole_shard_the_first_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [], [])
    (folder / "000.tar").write_bytes(b"")
    (folder / "001.tar").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"000\.tar: it is empty .*\. Shards that are not whole: 2 of 2\.$"):
        opened(folder, bad_samples=1.0)


def test_addresses_and_commands_are_indexed_like_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = write(tmp_path / "a", samples(3), samples(2, 1))
    memory = fsspec.filesystem("memory")
    for path in local.iterdir():
        memory.pipe_file(f"/index/{path.name}", path.read_bytes())
    first = opened(local)
    far = opened("memory://index/{000..001}.tar")
    piped = opened(f"pipe:cat {local}/{{000..001}}.tar")
    for index in (far, piped):
        assert index.rows.tolist() == first.rows.tolist()
        assert content(index, 4) == content(first, 4)
    assert far.identity == piped.identity == first.identity
    memory.pipe_file("/index/001.tar", tar(samples(5, 7)))
    monkeypatch.setattr(places, "stamp", lambda place: pytest.fail(f"{place} was asked for"))
    assert opened("memory://index/{000..001}.tar").identity == first.identity  # a start does not ask
    monkeypatch.undo()
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "cache"))
    assert len(opened("memory://index/{000..001}.tar", refresh=True)) == 8
    changed(local, 0, samples(4, 8))
    assert opened(f"pipe:cat {local}/{{000..001}}.tar").identity == first.identity
    assert len(opened(f"pipe:cat {local}/{{000..001}}.tar", refresh=True)) == 6


def test_a_copy_of_a_changed_address_is_made_anew(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/copy/0.tar", tar(samples(3)))
    opened("memory://copy/0.tar")
    memory.pipe_file("/copy/0.tar", tar(samples(3, 4)))
    index = opened("memory://copy/0.tar", refresh=True)
    assert content(index, 1) == samples(3, 4)[1][1:]
    assert shard_cache.copy_of("memory://copy/0.tar").exists()


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


@pytest.mark.parametrize(
    "damage", [damaged, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:40])]
)
def test_damaged_files_of_the_cache_are_made_anew(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    folder = write(tmp_path / "a", samples(3), samples(2, 1))
    first = opened(folder)
    rows = first.rows.tolist()
    for path in (tmp_path / "cache" / "index" / "shards").glob("*/*.idx"):
        damage(path)
    for path in (tmp_path / "cache" / "index").glob("*.rows"):
        path.write_bytes(b"short")
    again = opened(folder)
    assert again.identity == first.identity and again.rows.tolist() == rows
    packed_index.path_of(expand_sources(str(folder))).write_text("{}")
    assert opened(folder).identity == first.identity


def test_a_damaged_bad_list_is_one_line(tmp_path: Path) -> None:
    index = opened(write(tmp_path / "a", samples(3)))
    list_bad(index, [(0, "kind", "name")])
    with path_of(index.identity).open("a") as file:
        file.write("{'no json\n")
    with pytest.raises(UserError, match=r"\.bad\.jsonl: line 2 is damaged; delete that line\.$"):
        read_bad(index.identity)


def test_a_line_that_was_cut_is_skipped_and_the_next_one_stands_alone(tmp_path: Path) -> None:
    index = opened(write(tmp_path / "a", samples(5)))
    list_bad(index, [(0, "kind", "a"), (1, "kind", 'b"\\\u00e9')])
    path = path_of(index.identity)
    whole = path.read_bytes()
    for length in range(1, len(whole.splitlines(keepends=True)[1]) - 2):
        path.write_bytes(whole[: whole.index(b"\n") + 1 + length])
        assert read_bad(index.identity) == {0: "kind"}
        bad_list._known.clear()
        assert list_bad(index, [(2, "other", ""), (0, "again", "")]) == 1
        assert read_bad(index.identity) == {0: "kind", 2: "other"} and read_bad(index.identity)[2] == "other"


def test_a_list_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = opened(write(tmp_path / "a", samples(5)))
    monkeypatch.setattr(bad_list.os, "write", lambda file, content: len(content) // 2)
    listing = _Listing()
    for number in range(2):
        listing(index, [Bad(number, "truncated image", "0.tar", "a")])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot write the list of bad samples" in said and "No space left" in said


def test_the_list_is_read_once_by_who_adds_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = opened(write(tmp_path / "a", samples(5)))
    list_bad(index, [(0, "kind", "a")])
    monkeypatch.setattr(bad_list, "read_bad", lambda identity: pytest.fail("it was read again"))
    assert list_bad(index, [(0, "kind", "a"), (1, "kind", "b")]) == 1


def test_a_long_list_takes_few_bytes(tmp_path: Path) -> None:
    """Of 100,000 pairs, which took 18 MB as a dictionary."""
    index = replace(opened(write(tmp_path / "a", samples(2))), starts=np.array([0, 400_000_000]))
    numbers = np.random.default_rng(0).permutation(400_000_000 // 4000)[:100_000] * 4000
    list_bad(index, [(int(number), "truncated image", "000123") for number in numbers])
    bad = read_bad(index.identity)
    assert len(bad) == 100_000 and all(number in bad for number in numbers[:1000].tolist()) and 4001 not in bad
    assert len(pickle.dumps(bad)) < 1_100_000
    assert list(itertools.islice(bad.items(), 2)) == [(0, "truncated image"), (4000, "truncated image")]


def _list(index: Index, numbers: list[int]) -> None:
    for number in numbers:
        list_bad(index, [(number, "kind", "x" * 50)])


def test_several_processes_list_at_once(tmp_path: Path) -> None:
    index = opened(write(tmp_path / "a", samples(200)))
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=_list, args=(index, list(range(part, 200, 4)))) for part in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert read_bad(index.identity) == dict.fromkeys(range(200), "kind")


BUILD = """
import sys
from upcycle_bench.data import shard_index
from upcycle_bench.data.open_index import open_index
from upcycle_bench.data.sources import expand_sources
plain = shard_index.build
def build(*arguments):
    rows = plain(*arguments)
    print("built", flush=True)
    return rows
shard_index.build = build
print(open_index(expand_sources(sys.argv[1])).identity)
"""


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_ranks_and_a_second_command_build_side_by_side(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", *(samples(4, n) for n in range(12)))
    ranks = [start(folder, RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2") for rank in range(2)] + [start(folder)]
    said = [process.communicate(timeout=120)[0].splitlines() for process in ranks]
    assert len({lines[-1] for lines in said}) == 1
    os.environ["UPCYCLE_BENCH_CACHE"] += "2"
    assert opened(folder).identity == said[0][-1]


def test_a_build_that_was_killed_goes_on(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", *(samples(300, n) for n in range(30)))
    killed = start(folder)
    assert killed.stdout is not None
    for _ in range(3):
        killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "index" / "shards").glob("*/*.idx")}
    assert 3 <= len(done) < 30
    index = opened(folder)
    assert len(index) == 9000 and all(path.stat().st_mtime_ns == when for path, when in done.items())
    assert content(index, 8999) == samples(300, 29)[299][1:]


def test_several_processes_of_one_command_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "a", *(samples(4, n) for n in range(3)))
    monkeypatch.setattr(opening, "WORTH_A_WORKER", 1)
    monkeypatch.setattr(opening, "cores", lambda: 2)
    monkeypatch.setattr(shard_index, "find_pairs", lambda *_: pytest.fail("it was built in this process"))
    assert len(opened(folder)) == 12


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "a", samples(2))
    (tmp_path / "file").touch()
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        UserError, match=r"^cannot write to the cache folder .*; set UPCYCLE_BENCH_CACHE to another one"
    ):
        opened(folder)


def test_an_archive_of_more_than_4_GB_has_places(tmp_path: Path) -> None:
    """Offsets are counted in blocks of 512 bytes: the second pair stands behind a sparse file of 5 GB."""
    path = tmp_path / "0.tar"
    with path.open("wb") as file:
        hole = tarfile.TarInfo("hole")
        hole.size = 5 << 30
        file.write(hole.tobuf(tarfile.GNU_FORMAT))
        file.seek(hole.size, io.SEEK_CUR)
        file.write(tar(samples(2)))
    index = opened(path)
    assert content(index, 1) == samples(2)[1][1:]
