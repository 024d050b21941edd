"""JSON without NaN and infinity, which JSON does not have though Python writes and reads them.

    text = dumps({"layers": {"vision.1": drift}})       # NotFiniteError: layers.vision.1 is nan, ...
    tree = loads(text)                                  # ValueError

Nothing else in the project calls `json.dumps` (tests/contract/test_rooms.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from upcycle_bench.util.errors import UserError


class NotFiniteError(UserError, ValueError):
    """A number for JSON is NaN or infinite."""


def dumps(value: Any, **form: Any) -> str:
    """`json.dumps` with that form (indent, sort_keys, ...); NotFiniteError that names the first such number."""
    try:
        return json.dumps(value, allow_nan=False, **form)
    except ValueError as error:
        if "JSON compliant" not in str(error):
            raise
        for where, number in _not_finite(value):
            raise NotFiniteError(f"{where} is {number}, so nothing is written; look for what has diverged.") from None
        raise


def loads(text: str | bytes) -> Any:
    """`json.loads`; ValueError for what is no JSON: NaN, numbers beyond float64 and a name twice in one object, too."""
    return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_once)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object; of two values of one name a reader would see only one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return found


def _not_finite(value: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """The places of all such numbers, as dotted paths."""
    if isinstance(value, Mapping):
        parts = [(str(key), each) for key, each in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(str(number), each) for number, each in enumerate(value)]
    elif isinstance(value, float) and not math.isfinite(value):
        yield where or "a number", value
        return
    else:
        return
    for name, each in parts:
        yield from _not_finite(each, f"{where}.{name}" if where else name)
