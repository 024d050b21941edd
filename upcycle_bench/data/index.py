"""The pairs of many shards as rows on disk: where each image and each caption stands, 16 bytes a pair.

    index.rows[index.starts[3] : index.starts[4]]       # the pairs of shard 3, in their order
    index.shard_of(numbers)                             # the shard of each pair

The rows are mapped into memory, so the processes of a machine share them, and only what is read takes memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

BLOCK = 512  # bytes of a tar archive's blocks: every file in it begins at one
NOWHERE = (1 << 32) - 1  # the block of an image that is lost with its shard until that is put back

# image, text: blocks from the shard's beginning to the file's content. check: 16 bits of a hash of name and caption.
ROW = np.dtype([("image", "<u4"), ("image_bytes", "<u4"), ("text", "<u4"), ("text_bytes", "<u2"), ("check", "<u2")])


@dataclass(frozen=True, eq=False)
class Index:
    """All pairs of some shards, numbered from 0 in the order of shards and of the samples in each.

    shards: the paths or addresses; source: of each shard, the number of the source that named it. starts: int64
    [shards + 1], the number of each shard's first pair. rows: `ROW` [pairs]. bad: pairs that are known to be bad, and
    their kind; they keep their numbers, and others are read in their place. left_out: samples that are no pairs, by
    kind. identity: a hash of names, sizes and captions; it does not change where a listed pair is mended.
    """

    shards: Sequence[str]
    source: Sequence[int]
    starts: np.ndarray
    rows: np.ndarray
    identity: str
    bad: Mapping[int, str] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def shard_of(self, numbers: np.ndarray) -> np.ndarray:
        """The number of the shard of each pair, int64."""
        return np.searchsorted(self.starts, numbers, side="right") - 1
