"""The index after its shards have changed: mended samples, damaged and exchanged shards, and alignment."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.index_files import (
    Saying,
    _own_cache,  # noqa: F401  (an autouse fixture)
    changed,
    content,
    opened,
    samples,
    tar,
    write,
)
from tests.data.test_pair_index import PNG
from upcycle_bench.data import packed_index, repacking
from upcycle_bench.data.bad_list import list_bad
from upcycle_bench.data.bad_samples import BadSample
from upcycle_bench.data.blocks import Reader
from upcycle_bench.data.index import NOWHERE, ROW
from upcycle_bench.data.mended import aligned, first_missing, left_of
from upcycle_bench.util.errors import UserError


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
