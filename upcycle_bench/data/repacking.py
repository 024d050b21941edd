"""The packed index after some shards have changed: the old numbers where they hold the old pairs, else other data.

    packed = repack(packed, stamps, "--data", print)    # the changed shards' own index files must be there

A shard that is cut for a moment keeps its numbers, and what is lost counts as such until it is put back. A data set
that the shards were before is kept, and taken back where they hold its pairs again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from upcycle_bench.data import packed_index, places
from upcycle_bench.data.bad_list import read_bad
from upcycle_bench.data.index import BLOCK, NOWHERE
from upcycle_bench.data.mended import aligned, first_missing, left_of
from upcycle_bench.data.packed_index import Fault, Packed, required
from upcycle_bench.data.places import Stamp
from upcycle_bench.util.errors import UserError

FRESH = "`upcycle-bench data index --fresh` numbers all anew, as another data set"


class _OtherData(Exception):
    """The shards are another data set; the text is a line."""


def repack(old: Packed, stamps: Sequence[Stamp], option: str, say: Callable[[str], None]) -> Packed:
    """Write the index anew after shards have changed; `say` is called with a line for each that says what this means.

    Raises UserError for a changed shard that is not whole, where its pairs are not those that were indexed.
    """
    earlier = packed_index.kept(old.sources)
    for packed in earlier:
        if _same(packed, stamps):
            return _take_back(old, packed, stamps, option, say)
    try:
        return _renumbered(old, stamps, option, say)
    except _OtherData as other:
        for packed in earlier:
            try:
                return _take_back(old, packed, stamps, option, say)
            except _OtherData:
                continue
        _require_whole(old, stamps, option)
        say(str(other))
    packed_index.keep(old)
    return packed_index.pack(old.sources, stamps)


def _same(packed: Packed, stamps: Sequence[Stamp]) -> bool:
    """Whether the shards hold what `packed` was made of."""
    shards = zip(packed.sources.shards, packed.stamps, stamps, packed.digests, strict=True)
    return all(before == now or required(place, now)[0].sha256 == digest for place, before, now, digest in shards)


def _take_back(old: Packed, packed: Packed, stamps: Sequence[Stamp], option: str, say: Callable[[str], None]) -> Packed:
    """The data set that the shards were before `old`, which is kept in turn."""
    lines: list[str] = []
    packed_index.keep(old)
    found = _renumbered(packed, stamps, option, lines.append)
    first = f"{option} {old.sources.shards[0]}".lstrip()
    say(f"{first}: these shards hold what was indexed before; its runs go on, {len(found.rows):,} pairs.")
    for line in lines:
        say(line)
    return found


def _renumbered(old: Packed, stamps: Sequence[Stamp], option: str, say: Callable[[str], None]) -> Packed:
    """Write `old` with the places that its pairs have now. _OtherData where they are not there."""
    listed = np.fromiter(sorted(read_bad(old.identity())), np.int64)
    faults = {fault[0]: fault for fault in old.faults}
    lines: list[str] = []

    def parts() -> Iterator[np.ndarray]:
        for number, (before, now) in enumerate(zip(old.stamps, stamps, strict=True)):
            first, last = old.starts[number], old.starts[number + 1]
            if before == now:
                yield old.rows[first:last]
                continue
            bad = (listed[np.searchsorted(listed, first) : np.searchsorted(listed, last)] - first).tolist()
            rows, fault, line = _of_shard(old, number, now, bad, option)
            faults.pop(number, None)
            if fault is not None:
                faults[number] = fault
            if line:
                lines.append(line)
            yield rows

    packed = packed_index.write_again(old, stamps, parts(), faults)
    for line in lines:
        say(line)
    return packed


def _of_shard(
    old: Packed, number: int, stamp: Stamp, bad: Sequence[int], option: str
) -> tuple[np.ndarray, Fault | None, str]:
    """The rows of a changed shard, what is wrong with it, and a line for the user or ""."""
    place = old.sources.shards[number]
    where = f"{option} {place}".lstrip()
    facts, new = required(place, stamp)
    fault = (number, facts.fault, facts.why) if facts.fault else None
    if facts.sha256 == old.digests[number]:
        return new, fault, ""
    rows = old.rows[old.starts[number] : old.starts[number + 1]]
    found = aligned(rows, bad, new)
    if found is not None:
        unused = len(new) - (len(rows) - len(bad))
        line = f"{unused:,} new or listed ones are not used ({FRESH})."
        return (
            found,
            fault,
            f"{where}: the shard has changed; its pairs keep their numbers, and {line}" if unused else "",
        )
    if fault is not None and (found := left_of(rows, bad, new)) is not None:
        gone = int((found["image"] == NOWHERE).sum())
        line = f"{gone:,} are lost until it is put back: {facts.why}"
        return found, fault, f"{where}: the shard is no longer whole; its pairs keep their numbers, and {line}"
    row = first_missing(rows, bad, new)
    assert row is not None
    raise _OtherData(
        f"{where}: the shard has changed, and pair {row:,} of it{_name(place, new, row)} is not what was indexed; this "
        "is another data set now, under which earlier runs do not go on, until the shard is put back."
    )


def _require_whole(old: Packed, stamps: Sequence[Stamp], option: str) -> None:
    """UserError for a changed shard that is not whole: it may be so for a moment only."""
    for place, before, now in zip(old.sources.shards, old.stamps, stamps, strict=True):
        if before != now and (facts := required(place, now)[0]).fault:
            where = f"{option} {place}".lstrip()
            raise UserError(f"{where}: the shard has changed and is not whole: {facts.why.rstrip('.')} ({FRESH}).")


def _name(place: str, rows: np.ndarray, row: int) -> str:
    """The beginning of the name of the file that a row names, in brackets; "" where the shard has no such row."""
    if row >= len(rows):
        return ""
    header = places.read(place, (int(rows[row]["image"]) - 1) * BLOCK, 100)
    return f" (now {header.partition(bytes(1))[0].decode('utf-8', 'replace')})"
