"""Pairs of shards: what is left out is counted by kind; a .txt is one caption, or has one a line."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from tests.data.test_shards import packed
from upcycle_bench.data.pair_index import KINDS, Counts, find_pairs, in_order, index_pairs, split_captions
from upcycle_bench.util.errors import UserError


def picture(side: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = picture()
PAIR = (("jpg", PNG), ("txt", b"a"))
# What a shard holds beside one good pair, and what of it is left out.
LEFT_OUT: list[tuple[dict[str, bytes], dict[str, int]]] = [
    ({}, {}),
    ({"1.JPEG": PNG, "1.TXT": b"a"}, {}),
    ({"1.jpg": PNG, "1.png": PNG, "1.txt": b"a", "1.json": b"{}", "1.seg.png": PNG}, {}),
    ({"1.txt": b"a"}, {"no image": 1}),
    ({"1.json": b"{}"}, {"no image": 1}),
    ({"1.jpg": PNG}, {"no caption": 1}),
    ({"1.jpg": PNG, "1.json": b"{}", "2.jpg": PNG, "2.cls": b"3"}, {"no caption": 2}),
    ({"1.jpg": PNG, "1.txt": "é".encode("latin-1"), "2.jpg": PNG, "2.txt": "a".encode("utf-16")}, {"not UTF-8": 2}),
    ({"1.jpg": PNG, "1.txt": b"", "2.jpg": PNG, "2.txt": b" \r\n\xc2\x85\n"}, {"empty caption": 2}),
    ({"1.gif": PNG, "1.txt": b"a", "2.jpg": PNG, "2.caption": b"a"}, {"unknown suffix": 2}),
    ({"a.b.jpg": PNG, "a.b.txt": b"a"}, {"dots in a name": 1}),
    ({"a.b.jpg": PNG, "a.txt": b"a"}, {"dots in a name": 1}),
    ({"a.jpg": PNG, "a.b.txt": b"a"}, {"dots in a name": 1}),
    ({f"2020.{n}.{suffix}": data for n in range(5) for suffix, data in PAIR}, {"dots in a name": 5}),
    ({f"a{n}.{suffix}": data for n in ("", ".1", ".2") for suffix, data in PAIR}, {"dots in a name": 2}),
    ({"1.jpg": PNG, "1.txt": b"a" * 65_536, "2.jpg": PNG, "2.txt": b"a" * 65_535}, {"caption too long": 1}),
    ({"README": b"", "d/.DS_Store": b"", "d/._0.jpg": b""}, {}),
    (
        {"1.jpg": PNG, "2.txt": b"a", "3.jpg": PNG, "3.txt": b"", "4.jpg": PNG},
        {"no image": 1, "no caption": 2, "empty caption": 1},
    ),
]


@pytest.mark.parametrize(("files", "left_out"), LEFT_OUT)
def test_what_is_left_out_is_counted_by_kind(tmp_path: Path, files: dict[str, bytes], left_out: dict[str, int]) -> None:
    (shard := tmp_path / "0.tar").write_bytes(packed([("0.png", PNG), ("0.txt", b"good"), *files.items()]))
    found = find_pairs(shard)
    assert in_order(found.left_out) == left_out and set(left_out) <= set(KINDS)
    assert found.pairs and not found.fault


def test_a_sample_whose_name_comes_twice_is_left_out(tmp_path: Path) -> None:
    files = [(f"{name}.{suffix}", data) for name in (0, 1, 0, 1, 2) for suffix, data in PAIR]
    (shard := tmp_path / "0.tar").write_bytes(packed(files))
    found = find_pairs(shard)
    assert [pair.key for pair in found.pairs] == ["0", "1", "2"]
    counts = Counts(4, in_order(found.left_out))
    assert str(counts) == "2 of 6 training samples are left out: 2 key twice"


def test_where_no_pair_is_left_the_line_says_what_there_is(tmp_path: Path) -> None:
    shards = [tmp_path / "0.tar", tmp_path / "1.tar"]
    for shard in shards:
        shard.write_bytes(packed([("0.gif", PNG), ("0.caption", b"a"), ("1.gif", PNG), ("1.json", b"{}")]))
    with pytest.raises(UserError) as caught:
        index_pairs(shards, "text", "--data")
    assert str(caught.value) == (
        f"--data {shards[0]} and 1 more: no sample with an image and a .txt caption; left out: 4 unknown suffix "
        "(an image is .png, .jpg, .jpeg, .webp, a caption .txt); suffixes: .gif (4), .caption (2), .json (2)."
    )
    shards[0].write_bytes(packed([]))
    with pytest.raises(UserError, match=r"left out: nothing; suffixes: none\.$"):
        index_pairs(shards[:1], "text")


NO_LINE_ENDS = "one\u2028two\x0bthree\x85four\x1cfive\rsix\u2029seven\x0ceight"


@pytest.mark.parametrize(
    ("text", "as_text", "as_lines"),
    [
        ("a cat", ["a cat"], ["a cat"]),
        ("a cat\n", ["a cat"], ["a cat"]),
        ("a cat\non a mat\r\n\r\nat noon\n", ["a cat\non a mat\r\n\r\nat noon"], ["a cat", "on a mat", "at noon"]),
        (NO_LINE_ENDS, [NO_LINE_ENDS], [NO_LINE_ENDS]),
        (" \n\t\r\n", [], []),
    ],
)
def test_captions_are_one_text_or_one_a_line(text: str, as_text: list[str], as_lines: list[str]) -> None:
    assert split_captions(text, "text") == as_text
    assert split_captions(text, "lines") == as_lines
