"""The index of a list of shards: the rows of all shards in one file, and what is known of them in another.

    packed = read(sources)                              # None where it was not packed, or is damaged
    packed = pack(sources, stamps)                      # of the shards' own index files, which must be there

The second file names the first one, and replaces its predecessor whole. Rows that another process may still read stay
until the next but one packing. After shards have changed, `upcycle_bench/data/repacking.py` writes it again.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from upcycle_bench.data import shard_index
from upcycle_bench.data.bad_list import read_bad
from upcycle_bench.data.index import ROW, Index
from upcycle_bench.data.pair_index import RULES, in_order
from upcycle_bench.data.places import Stamp, absolute
from upcycle_bench.data.sources import Sources
from upcycle_bench.util import strict_json
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.files import atomic, write_atomically

KEPT = 2  # data sets that shards were before, beside the present one
Fault = tuple[int, str, str]  # of a shard that is not whole: its number, kind, line


@dataclass(frozen=True, eq=False)
class Packed:
    """What is known of all shards; lists have an entry for each.

    sizes, times: the shards' stamps; digests: the sha256 of their pairs; starts: the number of their first pair.
    left_out, suffixes: of all samples, by kind. faults: of each shard that is not whole. version: of the packing.
    """

    sources: Sources
    sizes: list[int]
    times: list[int]
    digests: list[str]
    starts: list[int]
    left_out: dict[str, int]
    suffixes: dict[str, int]
    faults: list[Fault]
    version: int
    rows: np.ndarray

    @property
    def stamps(self) -> list[Stamp]:
        """The stamp of each shard when it was indexed."""
        return [Stamp(size, time) for size, time in zip(self.sizes, self.times, strict=True)]

    def facts(self) -> dict[str, Any]:
        """All but sources and rows, for JSON."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("sources", "rows")}

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
    return _load(sources, path_of(sources))


def bytes_of(sources: Sources) -> int:
    """Bytes of both files of a packed index."""
    path = path_of(sources)
    version = strict_json.loads(path.read_bytes())["version"]
    return path.stat().st_size + _rows_path(path, version).stat().st_size


def pack(sources: Sources, stamps: Sequence[Stamp]) -> Packed:
    """Write the index of all shards, numbered as they are now."""
    version = _next_version(path_of(sources))
    starts, digests, faults = [0], [], []
    left_out: Counter[str] = Counter()
    suffixes: Counter[str] = Counter()

    def parts() -> Iterable[np.ndarray]:
        for number, (place, stamp) in enumerate(zip(sources.shards, stamps, strict=True)):
            facts, rows = required(place, stamp)
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


def write_again(
    packed: Packed, stamps: Sequence[Stamp], parts: Iterable[np.ndarray], faults: Mapping[int, Fault]
) -> Packed:
    """Write `packed` with other places: the rows of each shard, as many as before. An error of `parts` changes nothing.

    faults: by shard, as they are when `parts` has ended.
    """
    path = path_of(packed.sources)
    version = _next_version(path)
    _write_rows(_rows_path(path, version), parts)
    return _commit(packed.sources, stamps, version, packed.facts() | {"faults": sorted(faults.values())})


def keep(packed: Packed) -> None:
    """Keep what `packed` is beside its successor, which is another data set: its shards may be put back.

    Of several the last KEPT stay: the rows of each may be large.
    """
    path = _kept_path(packed)
    _write_facts(path, packed.facts())
    others = sorted(set(_kept_paths(path_of(packed.sources))) - {path}, key=lambda each: each.stat().st_mtime_ns)
    for oldest in others[: max(0, len(others) + 1 - KEPT)]:
        oldest.unlink(missing_ok=True)


def kept(sources: Sources) -> list[Packed]:
    """The data sets that these shards were before."""
    path = path_of(sources)
    found = (_load(sources, each) for each in _kept_paths(path))
    return [packed for packed in found if packed is not None]


def _load(sources: Sources, path: Path) -> Packed | None:
    try:
        facts = strict_json.loads(path.read_bytes())
        rows = _rows_path(path_of(sources), facts["version"])
        if rows.stat().st_size != facts["starts"][-1] * ROW.itemsize:
            return None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None
    empty = facts["starts"][-1] == 0  # which cannot be mapped
    mapped = np.zeros(0, ROW) if empty else np.memmap(rows, ROW, mode="r")
    return Packed(sources, rows=mapped, **{**facts, "faults": [tuple(fault) for fault in facts["faults"]]})


def _commit(sources: Sources, stamps: Sequence[Stamp], version: int, facts: dict[str, Any]) -> Packed:
    path = path_of(sources)
    facts |= {"sizes": [s.size for s in stamps], "times": [s.time for s in stamps], "version": version}
    _write_facts(path, facts)
    packed = read(sources)
    assert packed is not None
    _kept_path(packed).unlink(missing_ok=True)
    needed = {version, version - 1, *(each.version for each in kept(sources))}
    for number in _versions(path) - needed:
        _rows_path(path, number).unlink(missing_ok=True)
    return packed


def _write_facts(path: Path, facts: dict[str, Any]) -> None:
    write_atomically(path, strict_json.dumps(facts, separators=(",", ":")).encode())


def _versions(path: Path) -> set[int]:
    """The packings of which there are rows."""
    return {int(rows.stem.rpartition("-")[2]) for rows in path.parent.glob(f"{path.stem}-*.rows")}


def _next_version(path: Path) -> int:
    return max(_versions(path), default=-1) + 1


def _kept_paths(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}-*.json"))


def _kept_path(packed: Packed) -> Path:
    path = path_of(packed.sources)
    return path.with_name(f"{path.stem}-{packed.identity()[:24]}.json")


def _rows_path(path: Path, version: int) -> Path:
    return path.with_name(f"{path.stem}-{version}.rows")


def _write_rows(path: Path, parts: Iterable[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part, part.open("wb") as file:
        for rows in parts:
            file.write(rows.tobytes())
        file.flush()
        os.fsync(file.fileno())  # before the facts that name it


def required(place: str, stamp: Stamp) -> tuple[shard_index.Facts, np.ndarray]:
    """The index of a shard, made where it is not there."""
    found = shard_index.read(place, stamp)
    while found is None:  # its file was damaged or deleted
        shard_index.build(place, stamp)
        found = shard_index.read(place, stamp)
    return found
