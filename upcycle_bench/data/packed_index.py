"""The index of a list of shards: the rows of all shards in one file, and what is known of them in another.

    packed = read(sources)                              # None where it was not packed, or is damaged
    packed = pack(sources, stamps)                      # of the shards' own index files, which must be there
    packed = repack(packed, stamps, option, say)        # after some shards have changed

The second file names the first one, and replaces its predecessor whole. Rows that another process may still read stay
until the next but one packing.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upcycle_bench.data import shard_index
from upcycle_bench.data.bad_list import read_bad
from upcycle_bench.data.index import BLOCK, ROW, Index
from upcycle_bench.data.mended import aligned, first_missing
from upcycle_bench.data.pair_index import RULES, in_order
from upcycle_bench.data.places import Stamp, absolute
from upcycle_bench.data.places import read as read_bytes
from upcycle_bench.data.sources import Sources
from upcycle_bench.util import strict_json
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.files import atomic, write_atomically


@dataclass(frozen=True, eq=False)
class Packed:
    """What is known of all shards; lists have an entry for each.

    sizes, times: the shards' stamps; digests: the sha256 of their pairs; starts: the number of their first pair.
    left_out, suffixes: of all samples, by kind. faults: (shard, kind, line) of each shard that is not whole. version:
    of the packing, from 0.
    """

    sources: Sources
    sizes: list[int]
    times: list[int]
    digests: list[str]
    starts: list[int]
    left_out: dict[str, int]
    suffixes: dict[str, int]
    faults: list[tuple[int, str, str]]
    version: int
    rows: np.ndarray

    @property
    def stamps(self) -> list[Stamp]:
        """The stamp of each shard when it was indexed."""
        return [Stamp(size, time) for size, time in zip(self.sizes, self.times, strict=True)]

    def identity(self) -> str:
        """sha256 over the base names of the shards and the hashes of their pairs, and the sources if there are several.

        It does not depend on folders and times, nor on what images hold beyond their sizes.
        """
        total = hashlib.sha256()
        several = len(set(self.sources.source)) > 1
        for place, source, digest in zip(self.sources.shards, self.sources.source, self.digests, strict=True):
            total.update(f"{source if several else 0}\0{place.rpartition('/')[2]}\0{digest}\n".encode())
        return total.hexdigest()

    def index(self, lost: Mapping[str, int]) -> Index:
        """The index. lost: pairs that are lost with shards that are not whole, by kind."""
        identity = self.identity()
        return Index(
            shards=self.sources.shards,
            source=self.sources.source,
            starts=np.array(self.starts, dtype=np.int64),
            rows=self.rows,
            identity=identity,
            bad=read_bad(identity),
            left_out=in_order({**self.left_out, **lost}),
        )


def path_of(sources: Sources) -> Path:
    """Where the facts of that list of shards are, or would be."""
    digest = hashlib.sha256(f"{RULES}\n".encode())
    for place, source in zip(sources.shards, sources.source, strict=True):
        digest.update(f"{source}\0{absolute(place)}\n".encode("utf-8", "surrogateescape"))
    return cache_root() / "index" / f"{digest.hexdigest()[:24]}.json"


def read(sources: Sources) -> Packed | None:
    """The packed index of these shards, with its rows mapped into memory; None where it is not there, or damaged."""
    path = path_of(sources)
    try:
        facts = strict_json.loads(path.read_bytes())
        rows = _rows_path(path, facts["version"])
        if rows.stat().st_size != facts["starts"][-1] * ROW.itemsize:
            return None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None
    empty = facts["starts"][-1] == 0  # which cannot be mapped
    mapped = np.zeros(0, ROW) if empty else np.memmap(rows, ROW, mode="r")
    return Packed(sources, rows=mapped, **{**facts, "faults": [tuple(fault) for fault in facts["faults"]]})


def bytes_of(sources: Sources) -> int:
    """Bytes of both files of a packed index."""
    path = path_of(sources)
    version = strict_json.loads(path.read_bytes())["version"]
    return path.stat().st_size + _rows_path(path, version).stat().st_size


def pack(sources: Sources, stamps: Sequence[Stamp], version: int = 0) -> Packed:
    """Write the index of all shards, numbered as they are now."""
    starts, digests, faults = [0], [], []
    left_out: Counter[str] = Counter()
    suffixes: Counter[str] = Counter()

    def parts() -> Iterable[np.ndarray]:
        for number, (place, stamp) in enumerate(zip(sources.shards, stamps, strict=True)):
            facts, rows = _required(place, stamp)
            starts.append(starts[-1] + len(rows))
            digests.append(facts.sha256)
            left_out.update(facts.left_out)
            suffixes.update(facts.suffixes)
            if facts.fault:
                faults.append((number, facts.fault, facts.why))
            yield rows

    _write_rows(_rows_path(path_of(sources), version), parts())
    facts = {
        "digests": digests,
        "starts": starts,
        "left_out": in_order(left_out),
        "suffixes": dict(suffixes.most_common(12)),
        "faults": faults,
    }
    return _commit(sources, stamps, version, facts)


def repack(old: Packed, stamps: Sequence[Stamp], option: str, say: Callable[[str], None]) -> Packed:
    """Write the index anew after shards have changed; each changed shard's own index must be there.

    Where they hold the old pairs, numbers and identity stay. Otherwise all is numbered as it is now, as other data.
    `say` is called with a line on either.
    """
    listed = np.array(sorted(read_bad(old.identity())), dtype=np.int64)
    changed: dict[int, np.ndarray] = {}
    faults = {number: (kind, why) for number, kind, why in old.faults}
    for number, (place, before, now) in enumerate(zip(old.sources.shards, old.stamps, stamps, strict=True)):
        if before == now:
            continue
        facts, new = _required(place, now)
        first, last = old.starts[number], old.starts[number + 1]
        rows, bad = old.rows[first:last], set((listed[(listed >= first) & (listed < last)] - first).tolist())
        if (found := aligned(rows, bad, new)) is None:
            row = first_missing(rows, bad, new)
            assert row is not None
            say(
                f"{option} {place}: the shard has changed, and pair {row:,} of it{_name(place, new, row)} is not what "
                "was indexed; this is another data set now, under which earlier runs do not go on.".lstrip()
            )
            return pack(old.sources, stamps, old.version + 1)
        changed[number] = found
        faults.pop(number, None)
        if facts.fault:
            faults[number] = (facts.fault, facts.why)
        if unused := len(new) - (len(rows) - len(bad)):
            say(
                f"{option} {place}: the shard has changed; its pairs keep their numbers, and {unused:,} new or "
                "listed ones are not used (`upcycle-bench data index --fresh` numbers all anew, as another data "
                "set).".lstrip()
            )
    return _with_rows(old, stamps, changed, faults)


def _with_rows(
    old: Packed, stamps: Sequence[Stamp], changed: dict[int, np.ndarray], faults: dict[int, tuple[str, str]]
) -> Packed:
    """The old packed index with other rows of some shards, as many as before."""

    def parts() -> Iterable[np.ndarray]:
        for number in range(len(old.sources.shards)):
            yield changed.get(number, old.rows[old.starts[number] : old.starts[number + 1]])

    version = old.version + 1
    _write_rows(_rows_path(path_of(old.sources), version), parts())
    facts = {
        "digests": old.digests,
        "starts": old.starts,
        "left_out": old.left_out,
        "suffixes": old.suffixes,
        "faults": [(number, *fault) for number, fault in sorted(faults.items())],
    }
    return _commit(old.sources, stamps, version, facts)


def _commit(sources: Sources, stamps: Sequence[Stamp], version: int, facts: dict[str, Any]) -> Packed:
    path = path_of(sources)
    facts |= {"sizes": [s.size for s in stamps], "times": [s.time for s in stamps], "version": version}
    write_atomically(path, strict_json.dumps(facts, separators=(",", ":")).encode())
    _rows_path(path, version - 2).unlink(missing_ok=True)
    packed = read(sources)
    assert packed is not None
    return packed


def _rows_path(path: Path, version: int) -> Path:
    return path.with_name(f"{path.stem}-{version}.rows")


def _write_rows(path: Path, parts: Iterable[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part, part.open("wb") as file:
        for rows in parts:
            file.write(rows.tobytes())
        file.flush()
        os.fsync(file.fileno())  # before the facts that name it


def _required(place: str, stamp: Stamp) -> tuple[shard_index.Facts, np.ndarray]:
    found = shard_index.read(place, stamp)
    while found is None:  # its file was damaged or deleted
        shard_index.build(place, stamp)
        found = shard_index.read(place, stamp)
    return found


def _name(place: str, rows: np.ndarray, row: int) -> str:
    """The beginning of the name of the file that a row names, in brackets; "" where the shard has no such row."""
    if row >= len(rows):
        return ""
    header = read_bytes(place, (int(rows[row]["image"]) - 1) * BLOCK, 100)
    return f" (now {header.partition(bytes(1))[0].decode('utf-8', 'replace')})"
