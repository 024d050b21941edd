"""The index of a data set: from the cache, where the shards are what they were, else built by all cores and ranks.

    index = open_index(expand_sources("train/{000..127}.tar"), "--data", reporter)

Each shard is read once, and then only asked for its size and time; those of an object store, not even that. A build
that was interrupted goes on. Ranks that share a cache begin with different shards, and then take over what is left.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from upcycle_bench.data import packed_index, places, shard_index
from upcycle_bench.data.index import NOWHERE, Index
from upcycle_bench.data.packed_index import Packed
from upcycle_bench.data.pair_index import require_pairs
from upcycle_bench.data.places import Stamp
from upcycle_bench.data.repacking import repack
from upcycle_bench.data.sources import Sources
from upcycle_bench.util import distributed
from upcycle_bench.util.cache import locked
from upcycle_bench.util.environment import cores
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.processes import results
from upcycle_bench.util.progress import Reporter

BAD_SAMPLES = 0.01  # the share of a data set that may be lost with shards that are not whole
FIRST = 5  # shards that are named
WORTH_A_WORKER = 64 << 20  # bytes of shards


def open_index(
    sources: Sources,
    option: str = "",
    reporter: Reporter | None = None,
    *,
    bad_samples: float = BAD_SAMPLES,
    fresh: bool = False,
    refresh: bool = False,
) -> Index:
    """The index of these shards. `fresh` and `refresh` as in `packed`.

    Raises UserError, which names `option`: for a shard that is missing or cannot be read; where more than the share
    `bad_samples` is lost with shards that are not whole; where there is no pair.
    """
    found = packed(sources, option, reporter, fresh=fresh, refresh=refresh)
    index = found.index(lost_pairs(found, option, bad_samples))
    require_pairs(len(index), index.left_out, found.suffixes, sources.shards, option)
    return index


def index_facts(
    sources: Sources, option: str, reporter: Reporter, *, fresh: bool = False, refresh: bool = False
) -> dict[str, Any]:
    """Of an index that is opened, or built: counts, bytes on disk, seconds, identity; of a new one, pairs a second."""
    start, before = time.perf_counter(), packed_index.read(sources)
    found = packed(sources, option, reporter, fresh=fresh, refresh=refresh)
    index = found.index(lost_pairs(found, option, 1.0))
    require_pairs(len(index), index.left_out, found.suffixes, sources.shards, option)
    seconds = time.perf_counter() - start
    warnings = [f"{sources.shards[number]}: {why}" for number, _, why in found.faults[:FIRST]]
    try:
        lost_pairs(found, option, BAD_SAMPLES)
    except UserError:
        warnings.append(
            f"a training refuses these shards: more than {BAD_SAMPLES:.0%} of the pairs are lost with them."
        )
    return {
        "number_of_shards": len(sources.shards),
        "pairs": len(index),
        "bad_pairs_on_the_list": len(index.bad),
        "bytes_of_shards": sum(found.sizes),
        "bytes_of_index": packed_index.bytes_of(sources),
        "seconds": round(seconds, 3),
        **({} if before else {"pairs_per_second": round(len(index) / seconds)}),
        "left_out": dict(index.left_out),
        "identity": index.identity,
        "warnings": warnings,
    }


def packed(
    sources: Sources,
    option: str = "",
    reporter: Reporter | None = None,
    *,
    fresh: bool = False,
    refresh: bool = False,
) -> Packed:
    """What the index is made of, whatever is wrong with the shards. UserError for one that cannot be read.

    fresh: number all pairs as they are now, whatever was indexed before. refresh: ask object stores whether their
    shards have changed, and read the output of commands again.
    """
    reporter = reporter or Reporter()
    before = packed_index.read(sources)
    stamps = _stamps(sources, before, option, refresh)
    if before is not None and not fresh and before.stamps == stamps:
        return before
    _build(sources, stamps, option, reporter)
    with locked(packed_index.path_of(sources)), reporter.task("packing the index"):
        before = packed_index.read(sources)  # another process may have packed it meanwhile
        if before is None:
            return packed_index.pack(sources, stamps)
        if fresh:
            return packed_index.pack(sources, stamps)
        if before.stamps == stamps:
            return before
        return repack(before, stamps, option, reporter.say if distributed.is_main() else _say)


def _say(line: str) -> None:
    """What a rank says whose reporter is silent: whoever comes first writes the index again, and others find it so."""
    print(line, file=sys.stderr, flush=True)


def lost_pairs(found: Packed, option: str, bad_samples: float) -> dict[str, int]:
    """How many pairs are lost with shards that are not whole, by kind.

    These are the pairs that stood in a shard when it was indexed, or that the mean of the whole shards lets expect.
    Raises UserError, which names the first such shard, where they are more than the share `bad_samples` of all, or no
    shard is whole.
    """
    if not found.faults:
        return {}
    faulty = {number for number, _, _ in found.faults}
    counts = np.diff(found.starts)
    whole = np.delete(counts, sorted(faulty))
    expected = int(np.ceil(whole.mean())) if len(whole) else 0
    lost: dict[str, int] = {}
    there = len(found.rows)
    for number, kind, _ in found.faults:
        rows = found.rows[found.starts[number] : found.starts[number + 1]]
        gone = int((rows["image"] == NOWHERE).sum())
        lost[kind] = lost.get(kind, 0) + max(1, gone, expected - (len(rows) - gone))
        there -= gone
    total = sum(lost.values())
    if not len(whole) or total > bad_samples * (total + there):
        number, _, why = found.faults[0]
        others = f" Shards that are not whole: {len(faulty):,} of {len(counts):,}." if len(faulty) > 1 else ""
        raise UserError(f"{option} {found.sources.shards[number]}: {why}{others}".lstrip())
    return lost


def _stamps(sources: Sources, before: Packed | None, option: str, refresh: bool) -> list[Stamp]:
    """The stamps of the shards as they are now; those of remote shards as they were, but for `refresh`."""
    if before is None:
        return places.stamps(sources.shards, option)
    if refresh:
        stamps = places.stamps(sources.shards, option)
        for number, place in enumerate(sources.shards):
            if places.is_pipe(place):  # its output alone would tell
                stamps[number] = Stamp(0, time.time_ns())
        return stamps
    local = [number for number, place in enumerate(sources.shards) if places.is_local(place)]
    stamps = before.stamps
    for number, stamp in zip(local, places.stamps([sources.shards[n] for n in local], option), strict=True):
        stamps[number] = stamp
    return stamps


def _build(sources: Sources, stamps: Sequence[Stamp], option: str, reporter: Reporter) -> None:
    """Write the index files of the shards that have none: this rank's own part first, then what others left."""
    work = [(place, stamp, option) for place, stamp in zip(sources.shards, stamps, strict=True)]
    rank, ranks = distributed.rank(), distributed.world_size()
    parts = [work[(rank + other) % ranks :: ranks] for other in range(ranks)]
    order = parts[0] + [piece for part in parts[1:] for piece in reversed(part)]
    missing = [piece for piece in order if not shard_index.path_of(*piece[:2]).exists()]
    weight = sum(stamp.size or WORTH_A_WORKER for _, stamp, _ in missing)  # a command's output may be large
    processes = min(cores() // distributed.local_world_size(), len(missing), weight // WORTH_A_WORKER)
    if processes > 1:
        results(shard_index.build, missing, processes, reporter.track, "indexing shards")
    else:
        for piece in reporter.track(missing, "indexing shards"):
            shard_index.build(*piece)
