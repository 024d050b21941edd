"""The list of bad pairs of a data set: a file beside its index, to which trainings and `data check --list` append.

    list_bad(index, [(17, "unreadable image", "000123")])       # pair 17, whose sample is called 000123
    bad = read_bad(index.identity)                              # a mapping {17: "unreadable image"}, 9 bytes a pair

A listed pair keeps its number and its part in the data's identity, and another one is read in its place. So a list may
grow, and a listed sample may be mended or removed, while runs go on. A line that a full disk or a crash cut is skipped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from upcycle_bench.data.index import Index
from upcycle_bench.util import strict_json
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import write_atomically

_ENTRY = re.compile(rb'\{"pair": (\d+), [^\n]*"kind": "([^"\\\n]*)"\}\n')  # as `list_bad` writes it
_BEGIN = b'{"pair": '

_known: dict[Path, set[int]] = {}  # what this process has listed, or found in a list to which it added


class BadPairs(Mapping[int, str]):
    """The kind of each listed pair: sorted numbers, and of each the place of its kind among all kinds."""

    def __init__(self, numbers: Sequence[int], kinds: Sequence[int], names: Sequence[str]) -> None:
        """Pair `numbers[i]` is of the kind `names[kinds[i]]`; of one that is there twice the first counts."""
        self._names = names
        self._numbers, first = np.unique(np.asarray(numbers, np.int64), return_index=True)
        self._kinds = np.asarray(kinds, np.uint16)[first]

    def __getitem__(self, number: int) -> str:
        place = int(self._numbers.searchsorted(number))
        if place == len(self._numbers) or self._numbers[place] != number:
            raise KeyError(number)
        return self._names[self._kinds[place]]

    def __contains__(self, number: object) -> bool:
        place = int(self._numbers.searchsorted(number))  # type: ignore[call-overload]
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


def unlist(identity: str, numbers: Collection[int]) -> None:
    """Take pairs off the list. What another process lists at that moment may be lost; it is met and listed again."""
    path = path_of(identity)
    if not numbers or not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if not ((match := _ENTRY.fullmatch(line)) and int(match[1]) in numbers)]
    write_atomically(path, b"".join(kept))
    _known.pop(path, None)


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
    numbers, kinds, names = array("q"), array("H"), dict[str, int]()
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for place, line in enumerate(file, start=1):
            if match := _ENTRY.fullmatch(line):
                pair, kind = int(match[1]), match[2].decode("utf-8", "replace")
            elif not line.strip() or _is_cut(line.rstrip(b"\n")):
                continue
            else:
                try:
                    entry = strict_json.loads(line)
                    pair, kind = int(entry["pair"]), str(entry["kind"])
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{path}: line {place} is damaged; delete that line.") from None
            numbers.append(pair)
            kinds.append(names.setdefault(kind, len(names)))
    return BadPairs(numbers, kinds, list(names))


def _is_cut(line: bytes) -> bool:
    """Whether it is the beginning of an entry alone."""
    return not line.rstrip().endswith(b"}") and (line.startswith(_BEGIN) or _BEGIN.startswith(line))
