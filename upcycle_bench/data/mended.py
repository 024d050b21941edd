"""Whether a changed shard still holds the pairs that its data set was made of.

    rows = aligned(old, listed, new)                    # the old numbering at the new places, or None
    row = first_missing(old, listed, new)               # then: the first old row that is not there again

A training is a function of the numbers of pairs. So a shard may be mended while its pairs keep their numbers: each pair
that is not listed as bad must be there again, in order, with the same sizes, name and caption. Places may move.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

SAME = ("image_bytes", "text_bytes", "check")


def aligned(old: np.ndarray, listed: Collection[int], new: np.ndarray) -> np.ndarray | None:
    """The rows `old` with the places of `new`, or None where they do not agree. All are `ROW`, of one shard.

    listed: the rows of `old` that are bad. They keep what they were, since nothing reads them.
    """
    rows = old.copy()
    for row, place in _partners(old, listed, new):
        if place is None:
            return None
        rows[row] = new[place]
    return rows


def first_missing(old: np.ndarray, listed: Collection[int], new: np.ndarray) -> int | None:
    """The first row of `old`, not listed, that is not in `new`; None where there is none."""
    return next((row for row, place in _partners(old, listed, new) if place is None), None)


def _partners(old: np.ndarray, listed: Collection[int], new: np.ndarray) -> list[tuple[int, int | None]]:
    """(row of `old`, row of `new`) of all that is not listed, up to the first that is not there."""
    there = new[list(SAME)].tolist()
    found: list[tuple[int, int | None]] = []
    place = 0
    for row, wanted in enumerate(old[list(SAME)].tolist()):
        if row in listed:
            continue
        while place < len(there) and there[place] != wanted:
            place += 1
        found.append((row, place if place < len(there) else None))
        if place == len(there):
            break
        place += 1
    return found
