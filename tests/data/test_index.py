"""The index on disk: rows, identity, shards that are not whole, builds that are interrupted or go on side by side."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.index_files import (
    TIMES,
    Sample,
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
from tests.data.test_shards import packed
from upcycle_bench.data import open_index as opening
from upcycle_bench.data import packed_index, places, shard_cache, shard_index
from upcycle_bench.data.sources import expand_sources
from upcycle_bench.util.errors import UserError


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
