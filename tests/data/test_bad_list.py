"""The list of bad pairs: damaged, cut, long, written by several processes, or not at all."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.data.index_files import (
    _own_cache,  # noqa: F401  (an autouse fixture)
    opened,
    samples,
    write,
)
from upcycle_bench.data import bad_list
from upcycle_bench.data.bad_list import list_bad, path_of, read_bad
from upcycle_bench.data.bad_samples import Bad
from upcycle_bench.data.index import Index
from upcycle_bench.data.training_pairs import _Listing
from upcycle_bench.util.errors import UserError


def test_a_damaged_bad_list_is_one_line(tmp_path: Path) -> None:
    index = opened(write(tmp_path / "a", samples(3)))
    list_bad(index, [(0, "kind", "name")])
    with path_of(index.identity).open("a") as file:
        file.write("{'no json\n")
    with pytest.raises(UserError, match=r"\.bad\.jsonl: line 2 is damaged; delete that line\.$"):
        read_bad(index.identity)


def test_a_line_that_was_cut_is_skipped_and_the_next_one_stands_alone(tmp_path: Path) -> None:
    index = opened(write(tmp_path / "a", samples(5)))
    list_bad(index, [(0, "kind", "a"), (1, "kind", 'b"\\\u00e9')])
    path = path_of(index.identity)
    whole = path.read_bytes()
    for length in range(1, len(whole.splitlines(keepends=True)[1]) - 2):
        path.write_bytes(whole[: whole.index(b"\n") + 1 + length])
        assert read_bad(index.identity) == {0: "kind"}
        bad_list._known.clear()
        assert list_bad(index, [(2, "other", ""), (0, "again", "")]) == 1
        assert read_bad(index.identity) == {0: "kind", 2: "other"} and read_bad(index.identity)[2] == "other"


def test_a_list_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = opened(write(tmp_path / "a", samples(5)))
    monkeypatch.setattr(bad_list.os, "write", lambda file, content: len(content) // 2)
    listing = _Listing()
    for number in range(2):
        listing(index, [Bad(number, "truncated image", "0.tar", "a")])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot write the list of bad samples" in said and "No space left" in said


def test_the_list_is_read_once_by_who_adds_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = opened(write(tmp_path / "a", samples(5)))
    list_bad(index, [(0, "kind", "a")])
    monkeypatch.setattr(bad_list, "read_bad", lambda identity: pytest.fail("it was read again"))
    assert list_bad(index, [(0, "kind", "a"), (1, "kind", "b")]) == 1


def test_a_long_list_takes_few_bytes(tmp_path: Path) -> None:
    """Of 100,000 pairs, which took 18 MB as a dictionary."""
    index = replace(opened(write(tmp_path / "a", samples(2))), starts=np.array([0, 400_000_000]))
    numbers = np.random.default_rng(0).permutation(400_000_000 // 4000)[:100_000] * 4000
    list_bad(index, [(int(number), "truncated image", "000123") for number in numbers])
    bad = read_bad(index.identity)
    assert len(bad) == 100_000 and all(number in bad for number in numbers[:1000].tolist()) and 4001 not in bad
    assert len(pickle.dumps(bad)) < 1_100_000
    assert list(itertools.islice(bad.items(), 2)) == [(0, "truncated image"), (4000, "truncated image")]


def _list(index: Index, numbers: list[int]) -> None:
    for number in numbers:
        list_bad(index, [(number, "kind", "x" * 50)])


def test_several_processes_list_at_once(tmp_path: Path) -> None:
    index = opened(write(tmp_path / "a", samples(200)))
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=_list, args=(index, list(range(part, 200, 4)))) for part in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert read_bad(index.identity) == dict.fromkeys(range(200), "kind")
