"""Places: files, addresses and commands give the same bytes; copies are made once and make room."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcycle_bench.data import places, shard_cache
from upcycle_bench.util.errors import UserError

CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPCYCLE_BENCH_LOCAL_CACHE", str(tmp_path / "local"))
    monkeypatch.setattr(shard_cache, "PAUSES", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    (path := tmp_path_factory.mktemp("places") / "0.tar").write_bytes(CONTENT)
    fsspec.filesystem("memory").pipe_file("/places/0.tar", CONTENT)
    return [str(path), "memory://places/0.tar", f"pipe:cat {path} | cat"]


@given(offset=st.integers(0, len(CONTENT) + 10), size=st.integers(0, 3000))
def test_a_range_is_the_same_bytes_everywhere(kinds: list[str], offset: int, size: int) -> None:
    for place in kinds:
        assert places.read(place, offset, size) == CONTENT[offset : offset + size]


def test_whole_shards_and_sizes(kinds: list[str]) -> None:
    for place in kinds:
        with places.open_place(place) as file:
            assert file.read() == CONTENT
            assert file.seek(5) == 5 and file.read(2) == CONTENT[5:7]
        assert places.size(place) == len(CONTENT)


def test_threads_and_forks_read_at_once(kinds: list[str]) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        for step in range(300):
            offset = (seed * 37 + step * 11) % len(CONTENT)
            if places.read(kinds[0], offset, 100) != CONTENT[offset : offset + 100]:
                wrong.append(offset)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    children = []
    for seed in range(2):
        if (child := os.fork()) == 0:
            work(seed)
            os._exit(bool(wrong))
        children.append(child)
    for thread in threads:
        thread.join()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0] and not wrong


def test_a_command_runs_once_and_a_failing_one_is_one_line(tmp_path: Path) -> None:
    count = tmp_path / "count"
    place = f"pipe:echo x >> {count}; echo content"
    assert [places.read(place, 0, 7), places.read(place, 3, 4)] == [b"content", b"tent"]
    assert count.read_text() == "x\n"
    with pytest.raises(
        UserError, match=r"^pipe:echo no >&2; false \| cat: it cannot be read \(the command ended with 1: no, tried 4"
    ):
        places.read("pipe:echo no >&2; false | cat", 0, 1)
    assert not list((tmp_path / "local" / "shards").glob("*.tmp"))


def test_a_network_error_is_tried_again_and_then_one_line(monkeypatch: pytest.MonkeyPatch, kinds: list[str]) -> None:
    class Flaky(type(fsspec.filesystem("memory"))):  # type: ignore[misc]
        cachable = False
        failures = 3

        def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
            if Flaky.failures:
                Flaky.failures -= 1
                raise TimeoutError("no answer")
            return super().cat_file(path, start, end)

    monkeypatch.setattr(shard_cache, "file_system", lambda address: (Flaky(), "/places/0.tar"))
    monkeypatch.setattr(places, "file_system", shard_cache.file_system)
    assert places.read(kinds[1], 3, 4) == CONTENT[3:7]
    Flaky.failures = 4
    with pytest.raises(UserError, match=r"^memory://places/0\.tar: it cannot be read \(no answer, tried 4 times\)"):
        places.read(kinds[1], 3, 4)


def test_what_is_not_there_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache.time, "sleep", lambda _: pytest.fail("it was tried again"))
    with pytest.raises(UserError, match=r"^memory://places/none\.tar: it is not there"):
        places.read("memory://places/none.tar", 0, 1)
    with pytest.raises(UserError, match=r"^--data .*/none\.tar: no such file; was it moved or deleted\?"):
        places.stamps([str(tmp_path / "none.tar")], "--data")
    with pytest.raises(FileNotFoundError):
        places.read(str(tmp_path / "none.tar"), 0, 1)


def test_the_least_recently_used_copies_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPCYCLE_BENCH_SHARD_CACHE", "2.5KB")
    commands = [f"pipe:head -c 1000 /dev/zero; : {n}" for n in range(4)]
    for age, command in enumerate(commands[:2]):
        shard_cache.opened(command).close()
        os.utime(shard_cache.copy_of(command), (age, age))
    shard_cache.opened(commands[0]).close()  # used again: now the other one is the oldest
    shard_cache.opened(commands[2]).close()
    assert [shard_cache.copy_of(command).exists() for command in commands] == [True, False, True, False]
    monkeypatch.setenv("UPCYCLE_BENCH_SHARD_CACHE", "10")
    shard_cache.opened(commands[3]).close()
    assert shard_cache.copy_of(commands[3]).exists()  # the newest stays, whatever the limit
    assert sum(path.suffix == ".tar" for path in (tmp_path / "local" / "shards").iterdir()) == 1
    monkeypatch.setenv("UPCYCLE_BENCH_SHARD_CACHE", "much")
    with pytest.raises(UserError, match=r"^UPCYCLE_BENCH_SHARD_CACHE='much' is no number of bytes; write it as 50GB"):
        shard_cache.limit()


def test_a_copy_that_another_process_deletes_at_once_is_read(kinds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a cache that is smaller than the shards that processes read at once."""
    monkeypatch.setattr(shard_cache, "_make_room", lambda newest, most: newest.unlink())
    for place in kinds[1:]:
        with places.open_place(place) as file:
            assert file.read() == CONTENT and places.size(place) == len(CONTENT)
        assert places.read(place, 3, 4) == CONTENT[3:7] and not shard_cache.copy_of(place).exists()


@pytest.mark.parametrize("mark", ["ETag", "Last-Modified"])
def test_a_web_server_tells_a_change_by_its_headers(monkeypatch: pytest.MonkeyPatch, mark: str) -> None:
    """fsspec takes what stands at an https address for unchanging."""
    info = {"size": 5}

    class Web:
        def info(self, path: str) -> dict[str, object]:
            return dict(info)

        def ukey(self, path: str) -> str:
            return path

    monkeypatch.setattr(places, "file_system", lambda address: (Web(), address))
    stamps = [places.stamp("https://a/0.tar")]
    for value in ("x", "y", "y"):
        info[mark] = value  # type: ignore[assignment]
        stamps.append(places.stamp("https://a/0.tar"))
    assert len(set(stamps)) == 3 and stamps[2] == stamps[3] and {stamp.size for stamp in stamps} == {5}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("UPCYCLE_BENCH_LOCAL_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"^cannot write to the shard cache .*; set UPCYCLE_BENCH_LOCAL_CACHE to"):
        shard_cache.opened("pipe:true")
