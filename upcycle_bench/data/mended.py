"""Whether a changed shard still holds the pairs that its data set was made of.

    rows = aligned(old, listed, new)                    # the old numbering at the new places, or None
    row = first_missing(old, listed, new)               # then: the first old row that is not there again
    rows = left_of(old, listed, new)                    # of a shard that is not whole: what is lost stands NOWHERE

A training is a function of the numbers of pairs. So a shard may be mended while its pairs keep their numbers: each pair
that is not listed as bad must be there again, in order, with the same sizes, name and caption. Places may move.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from upcycle_bench.data.index import NOWHERE


def aligned(old: np.ndarray, listed: Collection[int], new: np.ndarray) -> np.ndarray | None:
    """The rows `old` with the places of `new`, or None where they do not agree. All are `ROW`, of one shard.

    listed: the rows of `old` that are bad. They keep what they were, since nothing reads them.
    """
    wanted, places = _partners(old, listed, new)
    if len(places) < len(wanted):
        return None
    rows = old.copy()
    rows[wanted] = new[places]
    return rows


def first_missing(old: np.ndarray, listed: Collection[int], new: np.ndarray) -> int | None:
    """The first row of `old`, not listed, that is not in `new`; None where there is none."""
    wanted, places = _partners(old, listed, new)
    return None if len(places) == len(wanted) else int(wanted[len(places)])


def left_of(old: np.ndarray, listed: Collection[int], new: np.ndarray) -> np.ndarray | None:
    """The rows `old` with the places of `new`, which lacks some: those stand NOWHERE.

    None where `new` has more rows that are not in `old`, in its order, than `old` has listed ones.
    """
    wanted = _unlisted(old, listed)
    keys, there = _keys(old[wanted]), _keys(new)
    found = list(range(_same(keys, there)))  # of each row of `new` that is there, the place in `wanted`
    places, strange, known = found.copy(), 0, keys.tolist()
    for place, key in enumerate(there[len(found) :].tolist(), len(found)):
        try:
            found.append(known.index(key, found[-1] + 1 if found else 0))
        except ValueError:
            strange += 1
            if strange > len(old) - len(wanted):
                return None
        else:
            places.append(place)
    rows = old.copy()
    rows["image"][wanted] = NOWHERE
    rows[wanted[found]] = new[places]
    return rows


def _partners(old: np.ndarray, listed: Collection[int], new: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The rows of `old` that are not listed, and the row of `new` of each, up to the first that is not there."""
    wanted = _unlisted(old, listed)
    keys, there = _keys(old[wanted]), _keys(new).tolist()
    places = list(range(_same(keys, np.array(there, np.uint64))))
    place = len(places)
    for key in keys[len(places) :].tolist():
        try:
            place = there.index(key, place)
        except ValueError:
            break
        places.append(place)
        place += 1
    return wanted, places


def _unlisted(old: np.ndarray, listed: Collection[int]) -> np.ndarray:
    return np.setdiff1d(np.arange(len(old)), np.fromiter(listed, np.int64, len(listed)), assume_unique=True)


def _keys(rows: np.ndarray) -> np.ndarray:
    """What stays of each row while places move, in one number."""
    size, text, check = (rows[name].astype(np.uint64) for name in ("image_bytes", "text_bytes", "check"))
    keys: np.ndarray = size << np.uint64(32) | text << np.uint64(16) | check
    return keys


def _same(a: np.ndarray, b: np.ndarray) -> int:
    """How many numbers both begin with."""
    least = min(len(a), len(b))
    same = a[:least] == b[:least]
    return least if same.all() else int(same.argmin())
