"""The cache: where it is, that a final name only ever has a complete result, and that locks exclude each other."""

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from upcycle_bench.util.cache import build_once, cache_root, locked
from upcycle_bench.util.errors import UserError


def test_cache_root_prefers_own_variable_then_xdg_then_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", "")
    assert cache_root() == tmp_path / "xdg" / "upcycle-bench"
    for not_valid in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", not_valid)
        assert cache_root() == tmp_path / "home" / ".cache" / "upcycle-bench"


def write_file(staging: Path) -> None:
    staging.write_text("content")


def write_folder(staging: Path) -> None:
    staging.mkdir()
    (staging / "inside").write_text("content")


@pytest.mark.parametrize("build", [write_file, write_folder])
def test_builds_once_and_leaves_nothing_else(build, tmp_path):
    calls = []
    for _ in range(2):
        path = build_once(tmp_path / "deep" / "thing", lambda staging: (calls.append(staging), build(staging)))
    assert len(calls) == 1
    assert calls[0].name == "thing"
    assert [p.name for p in path.parent.iterdir()] == ["thing"]
    assert (path / "inside" if path.is_dir() else path).read_text() == "content"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_leaves_nothing(error, tmp_path):
    def build(staging: Path) -> None:
        write_folder(staging)
        raise error

    with pytest.raises(error):
        build_once(tmp_path / "thing", build)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("build", [write_file, write_folder])
def test_the_loser_of_a_race_takes_what_the_winner_made(build, tmp_path):
    def late(staging: Path) -> None:
        build_once(tmp_path / "thing", build)  # the winner arrives while we build
        if build is write_file:
            staging.write_text("late")
        else:
            staging.mkdir()
            (staging / "late").touch()

    path = build_once(tmp_path / "thing", late)
    assert path.read_text() == "content" if path.is_file() else [p.name for p in path.iterdir()] == ["inside"]
    assert list(tmp_path.iterdir()) == [path]


def race(path: Path, name: str, barrier, queue) -> None:
    def build(staging: Path) -> None:
        barrier.wait(timeout=30)  # both are building: neither saw the other's result
        staging.mkdir()
        for i in range(50):
            (staging / f"{i}").write_text(name)
        barrier.wait(timeout=30)

    build_once(path, build)
    queue.put({p.read_text() for p in path.iterdir()})


def test_two_processes_race_and_agree(tmp_path):
    # fork: the children need no imports of their own and start at once
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [context.Process(target=race, args=(tmp_path / "thing", name, barrier, queue)) for name in ("a", "b")]
    for process in processes:
        process.start()
    seen = [queue.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    assert seen[0] == seen[1]
    assert len(seen[0]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_a_stale_temporary_is_not_the_real_thing(tmp_path):
    stale = tmp_path / ".thing.abc.tmp" / "thing"
    stale.mkdir(parents=True)
    assert (build_once(tmp_path / "thing", write_folder) / "inside").exists()
    assert list(stale.iterdir()) == []


def test_an_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file.*UPCYCLE_BENCH_CACHE"):
        build_once(tmp_path / "file" / "thing", write_file)


def add_one(root: Path, barrier) -> None:
    """Read, wait, write back one more: a second process within it would lose a count."""
    barrier.wait(timeout=30)
    for _ in range(5):
        with locked(root / "thing"):
            number = int((root / "count").read_text())
            time.sleep(0.01)
            (root / "count").write_text(str(number + 1))


def test_one_process_at_a_time_holds_a_lock(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "count").write_text("0")
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=add_one, args=(tmp_path, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert (tmp_path / "count").read_text() == "15"


def hold(path: Path, held) -> None:
    with locked(path):
        held.set()
        time.sleep(60)


def test_a_lock_goes_with_its_process_and_others_are_free(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "cache"))
    context = multiprocessing.get_context("fork")
    held = context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "thing", held))
    holder.start()
    assert held.wait(timeout=30)
    with locked(tmp_path / "another"):
        pass
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join(timeout=30)
    with locked(tmp_path / "thing"):  # if the dead process held it, this would wait for ever
        assert holder.exitcode == -signal.SIGKILL


def test_a_lock_that_cannot_be_written_is_a_user_error(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write .*file.*UPCYCLE_BENCH_CACHE"), locked(tmp_path / "thing"):
        pytest.fail("there is no lock to hold")


def test_an_error_within_a_lock_is_the_callers(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OSError, match="of the work") as raised, locked(tmp_path / "thing"):
        raise OSError(errno.ENOLCK, "of the work")
    assert not isinstance(raised.value, UserError)
    with locked(tmp_path / "thing"):  # the lock was released
        pass


def wait_for_a_lock(path: Path, go, asking, got) -> None:
    go.wait(timeout=30)
    with locked(path.with_name("another")):  # no process holds that lock
        asking.set()
        with locked(path):
            got.set()


def test_a_second_process_waits_for_the_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    go, asking, got = (context.Event() for _ in range(3))
    other = context.Process(target=wait_for_a_lock, args=(tmp_path / "thing", go, asking, got))
    other.start()  # before this process takes the lock, or the fork would hold it too
    try:
        with locked(tmp_path / "thing"):
            go.set()
            assert asking.wait(timeout=30)
            assert not got.wait(timeout=0.5)
        assert got.wait(timeout=30)
        other.join(timeout=30)
        assert other.exitcode == 0
    finally:
        other.kill()
