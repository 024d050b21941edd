"""Locks on file systems with flock, without it, and with one that other machines do not see; a wait is said."""

import errno
import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import SoftFileLease

from upcycle_bench.util import locks
from upcycle_bench.util.locks import Attempt, hold

FORK = multiprocessing.get_context("fork")  # the children have what is patched here
CODES = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    locks._warn_once.cache_clear()
    yield
    locks._warn_once.cache_clear()


def without_flock(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """flock fails with that error; with 0 it works for one process only, as on Lustre with `localflock`."""

    def flock(*_: object) -> None:
        if code:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


def add_one(folder: Path, barrier: Any) -> None:
    """Read, wait, write back one more: a second process within it would lose a count."""
    barrier.wait(timeout=30)
    for _ in range(3):
        with hold(folder / "lock", "the sum"):
            number = int((folder / "count").read_text())
            time.sleep(0.01)
            (folder / "count").write_text(str(number + 1))


@pytest.mark.parametrize("code", [0, *CODES])
def test_one_process_at_a_time_without_flock(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flock(monkeypatch, code)
    (tmp_path / "count").write_text("0")
    barrier = FORK.Barrier(3)
    processes = [FORK.Process(target=add_one, args=(tmp_path, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert (tmp_path / "count").read_text() == "9"


def keep(file: Path, held: Any) -> None:
    with hold(file, "the work"):
        held.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Any]:
    """Another process, which holds the lock."""
    held = FORK.Event()
    process = FORK.Process(target=keep, args=(tmp_path / "lock", held))
    process.start()
    assert held.wait(timeout=30)
    yield process
    process.kill()
    process.join(timeout=30)


def test_a_wait_is_said_with_its_cause(
    tmp_path: Path, holder: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Soon, and again later, until the holder has ended, here by SIGKILL."""
    monkeypatch.setattr(locks, "SOON", 0.2)
    monkeypatch.setattr(locks, "AGAIN", 0.3)
    printed: list[str] = []

    def say(line: str) -> None:
        printed.append(line)
        if len(printed) == 2:
            os.kill(holder.pid, signal.SIGKILL)
            holder.join(timeout=30)

    monkeypatch.setattr(locks, "_say", say)
    with hold(tmp_path / "lock", "the dense model"):
        pass
    assert len(printed) == 2
    for line in printed:
        assert line.startswith(f"waiting for the dense model: process {holder.pid} on ") and line.endswith(" s so far")


@pytest.mark.parametrize("code", [0, errno.ENOLCK])
def test_a_holder_that_was_killed_is_not_waited_for(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    without_flock(monkeypatch, code)
    process = request.getfixturevalue("holder")
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=30)
    start = time.monotonic()
    with hold(tmp_path / "lock", "the work"):
        assert time.monotonic() - start < locks.LEASE / 2


def test_a_holder_on_another_machine_is_dead_without_a_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LEASE", 1.0)
    text = "filelock/2\npid=1\nhost=far-away\nmode=lease\ntoken=0\nduration=1.0\n"
    (tmp_path / "lock.lease").write_text(text)
    assert SoftFileLease(tmp_path / "lock.lease").owner is not None  # it reads as filelock's own
    start = time.monotonic()
    with hold(tmp_path / "lock", "the work"):
        assert 0.5 < time.monotonic() - start < 20


def test_a_missing_flock_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_flock(monkeypatch, errno.ENOSYS)
    for name in ("a", "b"):
        with hold(tmp_path / name, "the work"):
            pass
    err = capsys.readouterr().err
    assert err.startswith(f"warning: the file system of {tmp_path} has no file locks (flock: Function not implemented)")
    assert err.count("\n") == 1


def test_other_ranks_wait_in_silence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    locks._say("waiting")
    assert capsys.readouterr().err == ""


def test_an_error_that_is_none_of_locks_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flock(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"), hold(tmp_path / "lock", "the work"):
        pytest.fail("there is no lock to hold")


def test_the_probe_can_be_read_as_nfs_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFSv4 makes a shared flock a read lock, and refuses it on a file that is open for writing alone, with EBADF."""

    def flock(file: Any, operation: int) -> None:
        number = file if isinstance(file, int) else file.fileno()
        access = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
        if access == (os.O_WRONLY if operation & fcntl.LOCK_SH else os.O_RDONLY):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold(tmp_path / "lock", "the work"):
        pass
    lock = Attempt(tmp_path / "lock")
    assert lock.take()
    lock.release()


def test_nothing_but_the_lock_is_left(tmp_path: Path) -> None:
    with hold(tmp_path / "lock", "the work"):
        assert (tmp_path / "lock.lease").exists()
    assert not (tmp_path / "lock.lease").exists()


def test_a_dead_process_of_this_machine_holds_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    process = request.getfixturevalue("holder")
    lock = Attempt(tmp_path / "lock")
    assert lock.holder() == f"process {process.pid} on {os.uname().nodename}" and not lock.take()
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=30)
    assert lock.holder() is None and lock.take()
    lock.release()


def test_an_attempt_never_waits_and_names_the_holder(tmp_path: Path) -> None:
    lock, other = Attempt(tmp_path / "lock"), Attempt(tmp_path / "lock")
    assert lock.holder() is None
    assert lock.take() and not other.take()
    assert other.holder() == f"process {os.getpid()} on {os.uname().nodename}"
    other.release()  # what it does not hold
    assert not other.take()
    lock.release()
    assert other.take() and not lock.take()
    other.release()


def test_attempts_see_that_a_holder_on_another_machine_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lease has stood still for as long as it lasts, as seen by this one attempt; a new one knows nothing yet."""
    monkeypatch.setattr(locks, "LEASE", 1.0)
    text = "filelock/2\npid=1\nhost=far-away\nmode=lease\ntoken=0\nduration=1.0\n"
    (tmp_path / "lock.lease").write_text(text)
    lock = Attempt(tmp_path / "lock")
    assert not lock.take() and lock.holder() == "process 1 on far-away"
    time.sleep(1.1)
    assert not Attempt(tmp_path / "lock").take()
    assert lock.take()
    lock.release()
