"""Files that are written whole or not at all, and hashes of files."""

import errno
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest

from upcycle_bench.util import files
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import atomic, file_sha256, files_sha256, temporary, write_atomically


def test_a_file_appears_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("old")
    with atomic(path) as part:
        assert part.parent == tmp_path and part != path and not part.exists()
        part.write_text("new")
        part.chmod(0o600)  # some writers, such as safetensors, make private files
        assert path.read_text() == "old"
        assert list(tmp_path.rglob("*.json")) == [path]  # a search for records finds no half-written one
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode  # the usual permissions


def stopped(path: Path, half: bytes | None, error: BaseException) -> None:
    with atomic(path) as part:
        if half is not None:
            part.write_bytes(half)
        raise error


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("begun", [True, False])
def test_a_failure_leaves_the_old_file_alone(error: BaseException, begun: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)):
        stopped(path, b"half" if begun else None, error)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
    ],
)
def test_a_full_disk_is_one_line(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/file: no space is left on its disk; free some, or choose another folder"):
        stopped(tmp_path / "file", b"half", error)
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_does_not_say_it_counts_as_one_of_a_full_disk_where_nothing_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")  # torch.save
    with pytest.raises(RuntimeError, match="enforce"):
        stopped(tmp_path / "file", b"half", error)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    with pytest.raises(UserError, match="no space is left on its disk"):
        stopped(tmp_path / "file", b"half", error)


def test_a_writer_that_wrote_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "file"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "folder", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        write_atomically(tmp_path / "file" / "below", b"x")


def write_often(path: Path, barrier, content: bytes) -> None:
    barrier.wait(timeout=30)
    for _ in range(50):
        write_atomically(path, content)


def test_two_processes_write_the_same_file_at_once(tmp_path: Path) -> None:
    """At every moment the file is complete, from one of them."""
    path, contents = tmp_path / "file", (b"a" * 100_000, b"b" * 70_000)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    write_atomically(path, contents[0])
    processes = [context.Process(target=write_often, args=(path, barrier, content)) for content in contents]
    for process in processes:
        process.start()
    barrier.wait(timeout=30)
    seen = set()
    while any(process.is_alive() for process in processes):
        seen.add(path.read_bytes())
    assert seen <= set(contents) and seen
    assert [process.exitcode for process in processes] == [0, 0]
    assert list(tmp_path.iterdir()) == [path]


def test_two_temporary_names_of_one_path_differ(tmp_path: Path) -> None:
    with temporary(tmp_path / "file") as one, temporary(tmp_path / "file") as two:
        one.write_text("one")
        two.write_text("two")
        assert one.read_text() == "one" and one.name.startswith(".file.")
        one.rename(tmp_path / "by-its-content")  # a final name that was not known before
    assert [path.name for path in tmp_path.iterdir()] == ["by-its-content"]


def test_file_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    # the published test vector of SHA-256
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_several_files_are_hashed_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(20)]
    for path in paths:
        path.write_bytes(path.name.encode() * 10_000)
    assert files_sha256(iter(paths)) == [file_sha256(path) for path in paths]
    assert len(set(files_sha256(paths))) == 20 and files_sha256([]) == []
    with pytest.raises(FileNotFoundError):
        files_sha256([paths[0], tmp_path / "absent"])
