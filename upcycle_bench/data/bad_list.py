"""The list of bad pairs of a data set: a file beside its index, to which trainings and `data check --list` append.

    list_bad(index, [(17, "unreadable image", "000123")])       # pair 17, whose sample is called 000123
    bad = read_bad(index.identity)                              # {17: "unreadable image"}

A listed pair keeps its number and its part in the data's identity, and another one is read in its place. So a list may
grow, and a listed sample may be mended or removed, while runs go on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from upcycle_bench.data.index import Index
from upcycle_bench.util import strict_json
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import UserError


def path_of(identity: str) -> Path:
    """The list of the data set with that identity."""
    return cache_root() / "index" / f"{identity[:24]}.bad.jsonl"


def list_bad(index: Index, entries: Iterable[tuple[int, str, str]]) -> int:
    """Append (number of the pair, kind, name of the sample or "") to the list; how many are new.

    The lines are appended by one write, so several processes may list at once. What is listed already stays as it is.
    """
    known = set(read_bad(index.identity))
    lines = []
    for number, kind, key in entries:
        if number in known:
            continue
        known.add(number)
        shard = int(index.starts.searchsorted(number, side="right")) - 1
        name, row = index.shards[shard].rpartition("/")[2], number - int(index.starts[shard])
        entry = {"pair": int(number), "shard": name, "row": row, "key": key, "kind": kind}
        lines.append(strict_json.dumps(entry) + "\n")
    if lines:
        path = path_of(index.identity)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(file, "".join(lines).encode())
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(f"cannot write the list of bad samples {path}: {error.strerror}.") from None
    return len(lines)


def read_bad(identity: str) -> dict[int, str]:
    """Number of each listed pair -> its kind; the first line of a pair counts. UserError for a damaged list."""
    try:
        lines = path_of(identity).read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    bad: dict[int, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = strict_json.loads(line)
            bad.setdefault(int(entry["pair"]), str(entry["kind"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path_of(identity)}: line {number} is damaged; delete that line.") from None
    return bad
