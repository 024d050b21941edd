"""The list of bad pairs of a data set: a file beside its index, to which trainings and `data check --list` append.

    list_bad(index, [(17, "unreadable image", "000123")])       # pair 17, whose sample is called 000123
    bad = read_bad(index.identity)                              # a mapping {17: "unreadable image"}, 9 bytes a pair

A listed pair keeps its number and its part in the data's identity, and another one is read in its place. So a list may
grow, and a listed sample may be mended or removed, while runs go on. A line that a full disk or a crash cut is skipped.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from upcycle_bench.data.index import Index
from upcycle_bench.util import strict_json
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import UserError

_ENTRY = re.compile(rb'\{"pair": (\d+), [^\n]*"kind": "([^"\\\n]*)"\}\n')  # as `list_bad` writes it
_BEGIN = b'{"pair": '

_known: dict[Path, set[int]] = {}  # what this process has listed, or found in a list to which it added


class BadPairs(Mapping[int, str]):
    """The kind of each listed pair: sorted numbers, and of each the place of its kind among all kinds."""

    def __init__(self, kinds: Mapping[int, str]) -> None:
        self._names = sorted(set(kinds.values()))
        place = {name: number for number, name in enumerate(self._names)}
        numbers = np.fromiter(kinds, np.int64, len(kinds))
        order = numbers.argsort()
        self._numbers = numbers[order]
        self._kinds = np.fromiter((place[name] for name in kinds.values()), np.uint16, len(kinds))[order]

    def __getitem__(self, number: int) -> str:
        place = int(self._numbers.searchsorted(number))
        if place == len(self._numbers) or self._numbers[place] != number:
            raise KeyError(number)
        return self._names[self._kinds[place]]

    def __contains__(self, number: object) -> bool:
        place = int(self._numbers.searchsorted(number))
        return place < len(self._numbers) and bool(self._numbers[place] == number)

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers.tolist())

    def __len__(self) -> int:
        return len(self._numbers)


def path_of(identity: str) -> Path:
    """The list of the data set with that identity."""
    return cache_root() / "index" / f"{identity[:24]}.bad.jsonl"


def list_bad(index: Index, entries: Iterable[tuple[int, str, str]]) -> int:
    """Append (number of the pair, kind, name of the sample or "") to the list; how many are new.

    The lines are appended by one write, so several processes may list at once. What is listed already stays as it is.
    UserError where the list cannot be written.
    """
    path = path_of(index.identity)
    if path not in _known or not path.exists():
        _known[path] = set(read_bad(index.identity))
    lines: dict[int, str] = {}
    for number, kind, key in entries:
        if number in _known[path] or number in lines:
            continue
        shard = int(index.starts.searchsorted(number, side="right")) - 1
        name, row = index.shards[shard].rpartition("/")[2], number - int(index.starts[shard])
        entry = {"pair": int(number), "shard": name, "row": row, "key": key, "kind": kind}
        lines[number] = strict_json.dumps(entry) + "\n"
    if lines:
        try:
            _append(path, "".join(lines.values()).encode())
        except OSError as error:
            raise UserError(f"cannot write the list of bad samples {path}: {error.strerror}.") from None
        _known[path] |= lines.keys()
    return len(lines)


def _append(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        end = os.fstat(file).st_size
        if end and os.pread(file, 1, end - 1) != b"\n":
            content = b"\n" + content
        if os.write(file, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(file)


def read_bad(identity: str) -> BadPairs:
    """Number of each listed pair -> its kind; the first line of a pair counts. UserError for a damaged list."""
    path = path_of(identity)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return BadPairs({})
    bad: dict[int, str] = {}
    kinds: dict[bytes, str] = {}
    begin, number = 0, 0
    while begin < len(content):
        number += 1
        if match := _ENTRY.match(content, begin):
            begin, (pair, kind) = match.end(), match.groups()
            bad.setdefault(int(pair), kinds.setdefault(kind, kind.decode("utf-8", "replace")))
            continue
        line, _, _ = content[begin : begin + (1 << 16)].partition(b"\n")
        begin += len(line) + 1
        if not line.strip() or _is_cut(line):
            continue
        try:
            entry = strict_json.loads(line)
            bad.setdefault(int(entry["pair"]), str(entry["kind"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: line {number} is damaged; delete that line.") from None
    return BadPairs(bad)


def _is_cut(line: bytes) -> bool:
    """Whether it is the beginning of an entry alone."""
    return not line.rstrip().endswith(b"}") and (line.startswith(_BEGIN) or _BEGIN.startswith(line))
