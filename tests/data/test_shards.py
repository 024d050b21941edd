"""Shards: what is no whole tar archive is told by its content, in one line; samples are grouped as webdataset does."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcycle_bench.data.shards import _Header, open_shard, read_member
from upcycle_bench.util.errors import UserError


def packed(files: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar archive of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def pairs(count: int) -> list[tuple[str, bytes]]:
    return [(f"{n}.{suffix}", bytes(700)) for n in range(count) for suffix in ("jpg", "txt")]


WHOLE = packed(pairs(3))  # each file takes 512 bytes of header and 1,024 of content
END = 3 * 2 * 1536
JOINED = ("0.jpg", b"a"), ("1.jpg", b"b"), ("0.txt", b"c"), ("1.txt", b"d")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is empty (0 bytes); copy or download it again."),
        (bytes(300), "it holds only zeros; copy or"),
        (bytes(20 << 10), "it holds only zeros from byte 0 to 20,480, like an unfinished download, after 0 whole"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer, .* run `git lfs pull`"),
        (b"\n<!DOCTYPE html><html><body>Log in</body>" + bytes(600), "it is a web page, such as a login or an error;"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "it is a web page"),
        (b'{"message": "Not Found"}', "it is JSON text, such as a server's error"),
        (gzip.compress(WHOLE), "compressed with gzip, .*; unpack it with `gunzip`"),
        (bz2.compress(WHOLE), "compressed with bzip2, .*; unpack it with `bunzip2`"),
        (lzma.compress(WHOLE), "compressed with xz, .*; unpack it with `unxz`"),
        (b"\x28\xb5\x2f\xfd" + bytes(900), "compressed with zstd, .*; unpack it with `unzstd`"),
        (b"PK\x03\x04" + bytes(900), "it is a zip archive; write its files with tar"),
        (b"PAR1" + bytes(900), "it is a Parquet table"),
        (b"not a tar file" * 100, "it is not a readable tar file; write it again with tar."),
        # 3 samples; the first file of the second one begins at byte 3,072, the second at 4,608, its content at 5,120
        (WHOLE[:3072], "it is cut at byte 3,072, at a header, after 1 whole sample; copy"),
        (WHOLE[: 3072 + 100], "it is cut at byte 3,172, at a header, after 1 whole sample; copy"),
        (WHOLE[:4608], "it is cut at byte 4,608, at a header, after 1 whole sample; copy"),
        (WHOLE[:5300], "it is cut at byte 5,300, within a file, after 1 whole sample; copy"),
        (WHOLE[: 4608 - 100], "it is cut at byte 4,508, within a file, after 1 whole sample; copy"),
        (WHOLE[:END], "it is cut at byte 9,216, at a header, after 3 whole samples; copy"),
        (WHOLE[: END + 511], "it is cut at byte 9,727, at a header, after 3 whole samples; copy"),
        (WHOLE[:700], "it is cut at byte 700, within a file, after 0 whole samples; copy"),
        (WHOLE[:3072] + b"?" + WHOLE[3073:], "its header at byte 3,072 is damaged or cut, after 1 whole sample;"),
        (
            WHOLE[:3072] + bytes(512) + WHOLE[3584:],
            "its end is marked at byte 3,072, but more follows up to byte 10,240",
        ),
        (WHOLE + WHOLE, "its end is marked at byte 9,216, but more follows .* as in joined archives, after 3 whole"),
        (
            WHOLE + bytes(2 << 20),
            "it holds only zeros from byte 9,216 to 2,107,392, like an unfinished download, after 3",
        ),
        (
            packed(JOINED),
            r"files of sample '0' do not stand side by side \(again at byte 2,048\); pack them sorted by name",
        ),
    ],
)
def test_what_is_no_whole_shard_is_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    (path := tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(UserError, match=says if "\\" in says or ".*" in says else re.escape(says)) as caught:
        open_shard(path, "--data")
    assert str(caught.value).startswith(f"--data {path}: ") and "\n" not in str(caught.value)


def test_names_with_dots_that_make_one_sample_of_several_are_called_so(tmp_path: Path) -> None:
    (path := tmp_path / "0.tar").write_bytes(packed([("a.1.jpg", b"a"), ("b.1.jpg", b"b"), ("a.2.jpg", b"c")]))
    with pytest.raises(
        UserError, match=r"sample 'a' .* \(again at byte 2,048\); rename files with dots in their names"
    ):
        open_shard(path)


def test_a_shard_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--data .*gone\.tar: it cannot be read \(No such file or directory\)"):
        open_shard(tmp_path / "gone.tar", "--data")


@pytest.mark.parametrize(
    ("content", "samples"),
    [
        (WHOLE, 3),
        (WHOLE[: END + 512], 3),  # one block of zeros ends an archive, too
        (WHOLE + bytes(1 << 19), 3),  # tar -b
        (packed([]), 0),
        (packed(pairs(3), tarfile.GNU_FORMAT), 3),
        (packed([("x" * 300 + ".jpg", b"a"), ("x" * 300 + ".txt", b"b")], tarfile.GNU_FORMAT), 1),
        (packed([("é" * 300 + ".jpg", b"a"), ("é" * 300 + ".txt", b"")]), 1),
    ],
)
def test_whole_shards_are_read(tmp_path: Path, content: bytes, samples: int) -> None:
    (path := tmp_path / "0.tar").write_bytes(content)
    found = open_shard(path)
    assert len(found.samples) == samples and found.repeated == 0
    assert all(list(members) == ["jpg", "txt"] for members in found.samples.values())


def test_samples_are_named_by_folder_and_name_up_to_the_first_dot(tmp_path: Path) -> None:
    names = ["./a.v1/0.JPG", "./a.v1/._0.jpg", "./a.v1/0.seg.png", "./README", "b/0.jpg", ".DS_Store", "b/0.txt"]
    (path := tmp_path / "0.tar").write_bytes(packed((name, b"x") for name in names))
    assert {name: list(members) for name, members in open_shard(path).samples.items()} == {
        "./a.v1/0": ["jpg", "seg.png"],
        "b/0": ["jpg", "txt"],
    }


@pytest.mark.parametrize(
    ("names", "repeated"),
    [
        (["0.jpg", "0.txt", "0.jpg", "0.txt", "1.jpg", "1.txt"], 1),  # side by side
        (["0.jpg", "0.txt", "1.jpg", "1.txt", "0.jpg", "0.txt", "0.jpg"], 2),  # and not
        (["0.jpg", "0.JPG", "0.txt", "1.jpg", "1.txt"], 1),
    ],
)
def test_of_samples_with_one_name_the_first_counts(tmp_path: Path, names: list[str], repeated: int) -> None:
    (path := tmp_path / "0.tar").write_bytes(packed((name, str(place).encode()) for place, name in enumerate(names)))
    found = open_shard(path)
    assert found.repeated == repeated and list(found.samples) == ["0", "1"]
    assert found.samples["0"]["jpg"].offset == 0


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    """GNU's sparse header stands for a file with holes: its bytes in the archive are not its content."""
    content = bytearray(packed([("0.jpg", b"x" * 512)], tarfile.GNU_FORMAT))
    content[156:157] = tarfile.GNUTYPE_SPARSE
    content[386:410] = b"00000000000\x0000000001000\x00"  # one piece: offset 0, 512 bytes
    content[483:495] = b"00000002000\x00"  # the real size, 1,024 bytes
    content[148:156] = b" " * 8
    content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()
    (path := tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(UserError, match="sample '0' is stored as a sparse file; pack it without tar's --sparse"):
        open_shard(path)


def test_every_cut_of_a_shard_is_seen(tmp_path: Path) -> None:
    """Wherever a shard is cut before its end mark is whole, it is one line and never fewer samples."""
    path = tmp_path / "0.tar"
    for size in range(0, END + 512, 97):
        path.write_bytes(WHOLE[:size])
        with pytest.raises(UserError):
            open_shard(path)


def test_a_hard_link_is_the_file_that_it_repeats(tmp_path: Path) -> None:
    """tar stores a file with two names once, and the second name as a link (mxmlnkn/ratarmount 28)."""
    (tmp_path / "0.jpg").write_bytes(b"pixels")
    (tmp_path / "1.jpg").hardlink_to(tmp_path / "0.jpg")
    with tarfile.open(path := tmp_path / "0.tar", "w") as tar:
        for name in ("0.jpg", "1.jpg"):
            tar.add(tmp_path / name, name)
        assert tar.getmember("1.jpg").islnk()
    with path.open("rb") as file:
        members = [members["jpg"] for members in open_shard(path).samples.values()]
        assert [read_member(file, member) for member in members] == [b"pixels"] * 2
    assert [member.name for member in members] == ["0.jpg", "1.jpg"]


@given(
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=110),
    size=st.integers(0, 1 << 34),
    damage=st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=2),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    kind=st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE]),
)
def test_a_header_is_what_tarfile_makes_of_it(
    name: str, size: int, damage: list[tuple[int, int]], form: int, kind: bytes
) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    try:
        header = bytearray(info.tobuf(form)[-512:])
    except ValueError:  # no room in ustar
        return
    for place, value in damage:
        header[place] = value

    def read(cls: type[tarfile.TarInfo]) -> tuple[str, int, bytes, int] | str:
        try:
            made = cls.frombuf(bytes(header), "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            return type(error).__name__
        kind = tarfile.REGTYPE if made.isreg() else made.type
        return made.name, made.size, kind, made.chksum

    assert read(_Header) == read(tarfile.TarInfo)
