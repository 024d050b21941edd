"""The index of one shard: a small file of the cache, written whole when the shard is read for the first time.

    build("train/000.tar", stamp, "--data")             # reads the shard's headers and captions
    found = read("train/000.tar", stamp)                # None where it is not there, or damaged

Its name is a hash of the shard's place, size and time, so a changed shard has another one. It holds a header of 32
bytes (magic, version of the rules, bytes of the facts, rows, checksum), the facts as JSON, and the rows.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from upcycle_bench.data.index import BLOCK, ROW
from upcycle_bench.data.pair_index import RULES, ShardPairs, find_pairs, in_order
from upcycle_bench.data.places import Stamp, absolute, forget
from upcycle_bench.util import strict_json
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import atomic

HEADER = struct.Struct("<8sIIIIQ")  # magic, rules, bytes of the facts, rows, crc32 of both, 0
MAGIC = b"UPCYIDX1"


@dataclass(frozen=True)
class Facts:
    """What is known of a shard: the hash of its pairs, samples that are left out by kind, what is wrong with it."""

    sha256: str
    left_out: dict[str, int]
    suffixes: dict[str, int]
    fault: str
    why: str


def path_of(place: str, stamp: Stamp) -> Path:
    """Where the index of that shard is, or would be."""
    what = f"{absolute(place)}\0{stamp.size}\0{stamp.time}\0{RULES}"
    name = hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_root() / "index" / "shards" / name[:2] / f"{name}.idx"


def build(place: str, stamp: Stamp, option: str = "") -> int:
    """Write the index of a shard, unless it is there; its pairs. UserError where the shard cannot be read."""
    path = path_of(place, stamp)
    if (there := read(place, stamp)) is not None:
        return len(there[1])
    forget(place)
    found = find_pairs(place, option)
    rows = rows_of(found)
    facts = Facts(digest(found), in_order(found.left_out), dict(found.suffixes), found.fault, found.why)
    said = strict_json.dumps(asdict(facts)).encode()
    body = said + rows.tobytes()
    header = HEADER.pack(MAGIC, RULES, len(said), len(rows), zlib.crc32(body), 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as part:
            part.write_bytes(header + body)
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {path.parent}: {error.strerror}; set UPCYCLE_BENCH_CACHE to another one."
        ) from None
    return len(rows)


def read(place: str, stamp: Stamp) -> tuple[Facts, np.ndarray] | None:
    """The facts and rows of a shard; None where they are not there, of other rules, or damaged."""
    try:
        content = path_of(place, stamp).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(content) < HEADER.size:
        return None
    magic, rules, said, rows, check, _ = HEADER.unpack_from(content)
    body = memoryview(content)[HEADER.size :]
    if (magic, rules, said + rows * ROW.itemsize) != (MAGIC, RULES, len(body)) or zlib.crc32(body) != check:
        return None
    return Facts(**strict_json.loads(bytes(body[:said]))), np.frombuffer(body, ROW, offset=said)


def rows_of(found: ShardPairs) -> np.ndarray:
    """The rows of a shard's pairs, `ROW` [pairs]."""
    return np.array(
        [
            (
                pair.image // BLOCK,
                pair.image_bytes,
                pair.text // BLOCK,
                len(pair.caption),
                zlib.crc32(pair.caption, zlib.crc32(_name(pair.key))) & 0xFFFF,
            )
            for pair in found.pairs
        ],
        ROW,
    )


def digest(found: ShardPairs) -> str:
    """sha256 over the name, the image's suffix and size, and the caption of all pairs."""
    total = hashlib.sha256()
    for pair in found.pairs:
        total.update(b"%s\0%s\0%d\0%d\0" % (_name(pair.key), pair.suffix.encode(), pair.image_bytes, len(pair.caption)))
        total.update(pair.caption)
    return total.hexdigest()


def _name(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")  # tarfile's form of names that are not UTF-8
