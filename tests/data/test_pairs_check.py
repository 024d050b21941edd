"""`data check` of training shards: counts, a line for what would stop a training, a warning for what is left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.data.test_pair_index import PNG, picture
from tests.data.test_shards import END, WHOLE, packed
from upcycle_bench.cli import app
from upcycle_bench.data import open_index, pairs_check
from upcycle_bench.data.bad_list import path_of, read_bad
from upcycle_bench.data.pairs_check import check_pairs, is_training
from upcycle_bench.data.sources import expand_sources
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.progress import Reporter

TRUNCATED = picture(64)[:60]


def good(count: int = 2) -> list[tuple[str, bytes]]:
    return [file for n in range(count) for file in ((f"{n}.png", PNG), (f"{n}.txt", b"a word"))]


@pytest.fixture
def train(tmp_path: Path) -> Path:
    (folder := tmp_path / "train").mkdir()
    for name, files in {"0.tar": good(), "1.tar": [*good(3), ("9.png", PNG), ("a.b.png", PNG)]}.items():
        (folder / name).write_bytes(packed(files))
    return folder


def checked(*arguments: str) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["data", "check", *arguments], catch_exceptions=False)
    return result.exit_code, result.stdout.splitlines()


def test_whole_shards_are_counted_and_what_is_left_out_is_a_warning(train: Path) -> None:
    status, lines = checked(str(train))
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert status == 0
    for row in ("shards 2", "training pairs 5", "left out: dots in a name 1", "left out: no caption 1"):
        assert row in text
    assert lines[-1] == (
        "warning: 2 of 7 samples are left out: 1 dots in a name (a name ends at its first dot, so a.b.jpg is no image; "
        "rename the files); 1 no caption (no .txt); suffixes: .png (6), .txt (5), .b.png (1)"
    )
    status, lines = checked(str(train), "--json")
    assert status == 0
    found = json.loads("\n".join(lines))["training"]
    assert len(found.pop("identity")) == 64
    assert found == {
        "shards": 2,
        "pairs": 5,
        "left_out": {"dots in a name": 1, "no caption": 1},
        "suffixes": {"png": 6, "txt": 5, "b.png": 1},
        "bad": {},
        "listed": 0,
        "good": 0,
        "problems": [],
    }


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is empty (0 bytes); copy or download it again."),
        (
            WHOLE[: END - 600],
            "it is cut at byte 8,616, within a file, after 2 whole samples; copy or download it again.",
        ),
        (b"<!DOCTYPE html>", "it is a web page, such as a login or an error; copy or download it again."),
        (
            packed([("0.png", PNG), ("1.png", PNG), ("0.txt", b"a")]),
            "the files of sample '0' do not stand side by side (again at byte 2,048); pack them sorted by name: "
            "`tar --sort=name`.",
        ),
    ],
)
def test_a_bad_shard_is_one_line_and_status_1(train: Path, content: bytes, problem: str) -> None:
    (train / "0.tar").write_bytes(content)
    status, lines = checked(str(train))
    assert status == 1 and f"{train / '0.tar'}: {problem}" in lines
    left = 5 if "2 whole samples" in problem else 3  # those of the other shard, and what is whole of this one
    assert f"training pairs {left}" in " ".join(" ".join(lines).split())


def test_images_that_cannot_be_read_are_one_line_a_shard(train: Path) -> None:
    (train / "0.tar").write_bytes(
        packed([*good(), ("5.png", PNG[:40]), ("5.txt", b"a"), ("6.jpg", b"?"), ("6.txt", b"a")])
    )
    status, lines = checked(str(train))
    assert status == 1 and lines[-1] == (
        f"{train / '0.tar'}: the image at byte 4608 (5.png) cannot be read (unreadable image: cannot identify image "
        "file); 2 images of this shard cannot be read."
    )
    assert lines[-2] == (
        "warning: 2 of 7 pairs are bad: 2 unreadable image (Pillow cannot read it). Put them on the list with --list, "
        "and then mend or remove them: the data's identity stays."
    )


def test_bad_images_are_listed_and_then_no_problem(train: Path) -> None:
    (train / "0.tar").write_bytes(packed([*good(), ("x/5.a.png", PNG), ("x/5.png", TRUNCATED), ("x/5.txt", b"a")]))
    status, lines = checked(str(train), "--list", "--json")
    found = json.loads("\n".join(lines))["training"]
    assert (status, found["bad"], found["listed"], found["problems"]) == (0, {}, 1, [])
    assert read_bad(found["identity"]) == {2: "truncated image"}
    (line,) = path_of(found["identity"]).read_text().splitlines()
    assert json.loads(line) == {"pair": 2, "shard": "0.tar", "row": 2, "key": "x/5", "kind": "truncated image"}
    status, lines = checked(str(train))
    assert status == 0 and "on the bad list 1" in " ".join(" ".join(lines).split())
    for flag in ("--list", "--unlist"):
        with pytest.raises(UserError, match="--list and --unlist go with training shards"):
            checked(str(train.parent / "sets"), flag)


def test_a_good_copy_of_what_is_listed_is_said_and_may_be_taken_off(train: Path) -> None:
    """The list is that of the data's identity, which every copy has; what is bad here, too, stays on it."""
    broken = PNG[:20] + bytes(len(PNG) - 20)  # of the same size
    bad = [("5.png", broken), ("5.txt", b"a"), ("6.png", broken), ("6.txt", b"a")]
    (train / "0.tar").write_bytes(packed([*good(), *bad]))
    checked(str(train), "--list")
    shutil.copytree(train, copy := train.parent / "copy")
    (copy / "0.tar").write_bytes(packed([*good(), ("5.png", PNG), *bad[1:]]))
    status, lines = checked(str(copy))
    assert status == 0 and "on the bad list 2" in " ".join(" ".join(lines).split())
    assert lines[-1].startswith(
        "warning: 1 listed pairs can be used here, and a training leaves them out: they were mended"
    )
    status, lines = checked(str(copy), "--unlist", "--json")
    found = json.loads("\n".join(lines))["training"]
    assert (status, found["listed"], found["good"]) == (0, 1, 0)
    assert [*read_bad(found["identity"])] == [3]
    status, lines = checked(str(train))
    assert status == 1 and "the image at byte" in lines[-1]  # in the first copy it is bad again


def test_shards_without_a_pair_are_a_problem(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(packed([("0.gif", PNG)]))
    status, lines = checked(str(tmp_path / "0.tar"))
    assert status == 1 and lines[-1].startswith(
        f"{tmp_path / '0.tar'}: no sample with an image and a .txt caption; left"
    )


def test_what_are_training_shards(train: Path, tmp_path: Path) -> None:
    for text in (
        str(train),
        str(train / "0.tar"),
        f"{train}/{{0..1}}.tar",
        f"{train}/7.tar",
        str(train / "0.tar.gz{}"),
    ):
        assert is_training(text)
    (split := tmp_path / "sets" / "photos" / "test").mkdir(parents=True)
    (split / "nshards.txt").write_text("1")
    (split / "0.tar").write_bytes(WHOLE)
    for folder in (split, split.parent, split.parent.parent, tmp_path / "nowhere"):
        assert not is_training(str(folder))
    with pytest.raises(UserError, match=r"^PATH .*: no such file: .*/6\.tar"):
        CliRunner().invoke(app, ["data", "check", f"{train}/{{6..7}}.tar"], catch_exceptions=False)


def test_many_shards_are_checked_by_several_processes(train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (train / "0.tar").write_bytes(packed([*good(), ("5.png", TRUNCATED), ("5.txt", b"a")]))
    sources = expand_sources(str(train))
    alone = check_pairs(sources, Reporter())
    assert alone.bad == {"truncated image": 1}
    for module in (pairs_check, open_index):
        monkeypatch.setattr(module, "WORTH_A_WORKER", 1)
        monkeypatch.setattr(module, "cores", lambda: 2)
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(train.parent / "cache"))
    assert check_pairs(sources, Reporter()) == alone
