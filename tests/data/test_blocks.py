"""Reading pairs: the bytes of a slow reading by tarfile, few reads and hardly a byte too many, patience with disks."""

from __future__ import annotations

import errno
import gc
import io
import itertools
import os
import tarfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from upcycle_bench.data import blocks, places, shard_cache
from upcycle_bench.data.bad_samples import BadSample
from upcycle_bench.data.blocks import GAP, SPAN, Reader, joined
from upcycle_bench.data.index import Index
from upcycle_bench.data.open_index import open_index
from upcycle_bench.data.order import Order
from upcycle_bench.data.sources import Sources
from upcycle_bench.util.errors import UserError


def write(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def image(number: int) -> bytes:
    return np.random.default_rng(number).bytes(20_000 + 37 * (number % 50))


def shard(path: Path, start: int, count: int) -> Path:
    files = {}
    for number in range(start, start + count):
        name = f"d/{number:05}"
        files |= {f"{name}.jpg": image(number), f"{name}.json": b"{}", f"{name}.txt": b"%d" % number}
    return write(path, files)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """512 pairs in two shards."""
    folder = tmp_path_factory.mktemp("shards")
    return open_index(Sources.of([shard(folder / "0.tar", 0, 300), shard(folder / "1.tar", 300, 212)]), "--data")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each read."""
    sizes: list[int] = []
    read = places.read

    def counted(place: str, offset: int, size: int) -> bytes:
        sizes.append(size)
        return read(place, offset, size)

    monkeypatch.setattr(places, "read", counted)
    return sizes


def check(reader: Reader, number: int) -> None:
    raw = reader.read(number)
    assert (raw.image, raw.text, raw.key) == (image(number), b"%d" % number, f"d/{number:05}")


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 511), max_size=60), st.lists(st.integers(0, 511), min_size=1, max_size=80))
def test_every_pair_is_what_its_shard_holds(index: Index, expected: list[int], read: list[int]) -> None:
    """Expected or not, once or often, in any order."""
    reader = Reader(index)
    reader.expect(np.array(expected, dtype=np.int64))
    for number in [*read, *expected]:
        check(reader, number)


def test_neighbours_are_read_at_once(index: Index, reads: list[int]) -> None:
    reader = Reader(index)
    reader.expect(np.random.default_rng(0).permutation(np.arange(64, 128)))
    for number in range(127, 63, -1):
        check(reader, number)
    assert len(reads) == 1 and reads[0] <= SPAN
    assert all(span.content is None for span in reader._spans.values())  # nothing is held any longer


def test_pairs_that_stand_alone_are_read_alone(index: Index, reads: list[int]) -> None:
    reader = Reader(index)
    reader.expect(np.arange(0, 300, 2))
    for number in range(0, 300, 2):
        check(reader, number)
    assert len(reads) == 150 and sum(reads) < 1.15 * sum(len(image(number)) for number in range(0, 300, 2))


def test_a_pair_whose_files_stand_apart_is_read_in_pieces(tmp_path: Path, reads: list[int]) -> None:
    """As a hard link's content, which stands where the file does that it repeats."""
    path = write(
        tmp_path / "0.tar", {"a.jpg": b"j" * 900, "a.txt": b"A", "b.bin": bytes(3 * GAP), "c.jpg": b"J", "c.txt": b"C"}
    )
    index = open_index(Sources.of([path]))
    index = replace(index, rows=np.array(index.rows))
    index.rows[0]["text"] = index.rows[1]["text"]
    reader = Reader(index)
    assert (reader.read(0).image, reader.read(0).text) == (b"j" * 900, b"C")
    assert reads == [512 + 900, 1] * 2


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 2), (2, 2), (4, 1), (2, 4)])
def test_an_epoch_reads_hardly_more_than_the_samples(index: Index, ranks: int, workers: int, reads: list[int]) -> None:
    """Batches of 128 in two lanes: each process reads its parts of an epoch; more ranks than lanes cost more reads."""
    order = Order(index.starts, index.source, 128, window=200)
    for rank in range(ranks):
        first, last = 128 // ranks * rank, 128 // ranks * (rank + 1)
        cuts = order.cuts(first, last, workers)
        for begin, stop in itertools.pairwise(cuts):
            reader, group = Reader(index), None
            for step in range(4):
                batches, row = order.group(0, step)
                if group is not batches:
                    reader.expect(batches[row:, begin:stop].flatten().numpy())
                    group = batches
                for number in batches[row, begin:stop].tolist():
                    check(reader, number)
    samples = sum(len(image(number)) + len(str(number)) for number in range(512))
    assert sum(reads) < 1.15 * samples  # headers and the .json
    if ranks <= 2:  # each process has whole lanes, or takes its turn
        assert len(reads) < 512 / 8


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def thread_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """The thread, place and bytes of each read."""
    found: list[tuple[str, int, int]] = []
    read = places.read

    def noted(place: str, offset: int, size: int, *pauses: Sequence[float]) -> bytes:
        found.append((threading.current_thread().name, offset, size))
        return read(place, offset, size, *pauses)

    monkeypatch.setattr(places, "read", noted)
    return found


def test_threads_read_what_comes_next_and_nobody_reads_it_again(
    index: Index, thread_reads: list[tuple[str, int, int]]
) -> None:
    now, then = np.arange(64, 128), np.r_[128:192, 320:384]
    reader = Reader(index)
    reader.expect(now, then)
    wait_until(lambda: len(thread_reads) == 3)
    for number in [*now, *then]:
        if number == then[0]:
            reader.expect(then)
        check(reader, number)
    assert [name for name, _, _ in thread_reads] == ["read ahead"] * 3 and reader.reads == 3
    assert reader.bytes == sum(size for _, _, size in thread_reads)
    assert all(span.content is None for span in reader._spans.values())  # nothing is held any longer


def test_a_reader_that_is_needed_no_more_leaves_no_thread(index: Index) -> None:
    reader = Reader(index)
    reader.expect(np.arange(64), np.arange(64, 128))
    gone = weakref.ref(reader)
    del reader
    wait_until(lambda: not any(thread.name == "read ahead" for thread in threading.enumerate()))
    gc.collect()
    assert gone() is None


def test_what_is_read_ahead_has_a_bound(
    index: Index, monkeypatch: pytest.MonkeyPatch, thread_reads: list[tuple[str, int, int]]
) -> None:
    """Of the two blocks that come next only one fits."""
    monkeypatch.setattr(blocks, "AHEAD", 2 << 20)
    reader = Reader(index)
    reader.expect(np.arange(64), np.r_[128:192, 320:384])
    wait_until(lambda: len(thread_reads) == 2)
    for number in range(64):
        check(reader, number)
    reader.expect(np.r_[128:192, 320:384])
    for number in np.r_[128:192, 320:384]:
        check(reader, number)
    assert sorted(name for name, _, _ in thread_reads) == ["MainThread", "read ahead", "read ahead"]


def test_what_cannot_be_read_ahead_is_read_with_patience(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[str] = []
    read = places.read

    def fails(place: str, offset: int, size: int, *pauses: Sequence[float]) -> bytes:
        if threading.current_thread().name == "read ahead":
            failed.append(place)
            raise OSError(errno.EIO, "input/output error")
        return read(place, offset, size, *pauses)

    monkeypatch.setattr(places, "read", fails)
    reader = Reader(index)
    reader.expect(np.arange(64), np.arange(64, 128))
    wait_until(lambda: len(failed) == 2)
    for number in range(64):
        check(reader, number)
    assert reader.reads == 1


def test_a_fork_reads_ahead_by_threads_of_its_own(index: Index) -> None:
    """Its parent's are not there, and what they were at work on is not waited for."""
    reader = Reader(index)
    reader.expect(np.arange(64), np.arange(64, 128))
    for span in {id(span): span for span in [*reader._spans.values(), *reader._then[1].values()]}.values():
        span.lock.acquire()  # as if a thread held it at the moment of the fork
    reader._counting.acquire()
    if (child := os.fork()) == 0:
        status = 1
        try:
            check(reader, 3)
            reader.expect(np.arange(64, 128), np.arange(128, 192))
            check(reader, 70)
            wait_until(lambda: reader._then[1] and all(span.content for span in reader._then[1].values()))
            status = 0
        finally:
            os._exit(status)
    ended: list[tuple[int, int]] = []
    wait_until(lambda: ended.append(os.waitpid(child, os.WNOHANG)) is None and ended[-1][0] == child)
    assert ended[-1][1] == 0


def test_spans_end_where_neighbours_are_far_or_many() -> None:
    near, far = 100 + GAP, 201 + 2 * GAP
    pieces = [(0, 0, 100), (0, near, 200 + GAP), (0, far, far + 99), (1, 0, SPAN), (1, SPAN, SPAN + 1)]
    spans = [joined(pieces)[piece] for piece in pieces]
    assert [(span.begin, span.end) for span in spans] == [
        *[(0, 200 + GAP)] * 2,
        (far, far + 99),
        (0, SPAN),
        (SPAN, SPAN + 1),
    ]


def failing(
    times: int, error: OSError, only: Callable[[int, int], bool] = lambda offset, size: True
) -> Callable[..., bytes]:
    """`places.read` that fails so often."""
    read, left = places.read, [times]

    def fails(place: str, offset: int, size: int) -> bytes:
        if only(offset, size) and left[0]:
            left[0] -= 1
            raise error
        return read(place, offset, size)

    return fails


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_disk_is_asked_three_times(index: Index, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    monkeypatch.setattr(blocks, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(places, "read", failing(2, OSError(error, os.strerror(error))))
    check(Reader(index), 5)
    monkeypatch.setattr(places, "read", failing(9, OSError(error, os.strerror(error))))
    with pytest.raises(BadSample, match=f"^read error: {os.strerror(error)}$"):
        Reader(index).read(5)


def test_an_outage_of_an_object_store_is_read_errors_and_then_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for once, not for each pair; an index that is built needs all, and ends with one line."""
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/outage/0.tar", shard(tmp_path / "0.tar", 0, 70).read_bytes())
    index = open_index(Sources.of(["memory://outage/0.tar"]))
    shard_cache.copy_of(index.shards[0]).unlink()
    places._open.clear()
    waited: list[float] = []
    tries, cat = [], type(memory).cat_file

    def out(self: object, path: str, **how: int) -> bytes:
        tries.append(path)
        raise TimeoutError("no answer")

    monkeypatch.setattr(type(memory), "cat_file", out)
    monkeypatch.setattr(shard_cache.time, "sleep", waited.append)
    reader = Reader(index)
    reader.expect(np.arange(64))
    for number in range(64):
        with pytest.raises(BadSample, match=r"^read error: no answer(, tried 10 times)?$"):
            reader.read(number)
    assert tuple(waited) == blocks.OUTAGE and sum(waited) > 120 and len(tries) < 10 + 2 * 64 + 1
    monkeypatch.setattr(type(memory), "cat_file", cat)
    check(reader, 3)
    monkeypatch.setattr(type(memory), "cat_file", out)
    with pytest.raises(BadSample):
        reader.read(68)
    assert tuple(waited) == 2 * blocks.OUTAGE


def test_a_command_that_fails_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path / "0.tar", 0, 70)
    index = open_index(Sources.of([f"pipe:cat {path}"]))
    shard_cache.copy_of(index.shards[0]).unlink()
    places._open.clear()
    path.rename(tmp_path / "away")
    waited: list[float] = []
    monkeypatch.setattr(shard_cache.time, "sleep", waited.append)
    reader = Reader(index)
    for number in range(4):
        with pytest.raises(BadSample, match=r"^read error: the command ended with 1: .*No such file"):
            reader.read(number)
    assert tuple(waited) == blocks.OUTAGE
    path.hardlink_to(tmp_path / "away")
    check(reader, 3)


def test_one_bad_sector_costs_one_sample(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a whole block cannot be read, its pairs are read one by one."""
    place = int(index.rows[70]["image"]) * 512
    broken = failing(-1, OSError(errno.EIO, "input/output error"), lambda offset, size: offset <= place < offset + size)
    monkeypatch.setattr(blocks, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(places, "read", broken)
    reader = Reader(index)
    reader.expect(np.arange(64, 128))
    for number in range(64, 128):
        if number == 70:
            with pytest.raises(BadSample, match="read error"):
                reader.read(number)
        else:
            check(reader, number)


def test_a_shard_that_is_gone_ends_the_run_with_one_line(index: Index, tmp_path: Path) -> None:
    gone = replace(index, shards=[str(tmp_path / "gone.tar"), index.shards[1]])
    with pytest.raises(UserError, match=r"gone\.tar: the shard is gone since the training began; put it back\."):
        Reader(gone).read(5)


def test_a_shard_that_changed_is_noticed(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", 0, 20)
    index = open_index(Sources.of([path]))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])  # in place, as a download that begins anew
    kinds = set()
    for number in range(20):
        try:
            check(Reader(index), number)
        except BadSample as error:
            kinds.add(error.kind)
    assert kinds == {"cut shard"}
    shard(path, 7, 20)
    with pytest.raises(BadSample, match="changed shard"):
        Reader(index).read(3)
