"""The file of a protocol: its TOML tables, after `extends`. `upcycle_bench.protocol` checks what they hold.

    tables = read_tables(Path("lab-long.toml"))     # {"summary": ..., "train": {"schedule": {"steps": ...}}, ...}
    flatten(tables)["train.schedule.steps"]         # by the keys of `--set`
    parse_value("4"), parse_value("lab")            # the value of a `--set`: 4, "lab"

A file with `extends = "other"` takes every value that it does not set from other.toml in the same folder, but for the
table `[tuning]`: what trains otherwise, or is scored otherwise, is not tuned as the other one is.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from upcycle_bench.util.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_tables(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's tables; with `extends = "other"`, merged into those of other.toml in the same folder.

    `children` are the files that extend this one.
    """
    if path.resolve() in children:
        raise UserError(f"protocol {path}: it extends itself, by way of {children[-1].name}.")
    try:
        tree = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"protocol {path}: {error}") from None
    if (parent := tree.pop("extends", None)) is None:
        return tree
    beside = path.parent / f"{parent}.toml"
    if not beside.is_file():
        raise UserError(f"protocol {path}: extends = {parent!r}, but there is no {beside}.")
    below = read_tables(beside, (*children, path.resolve()))
    below.pop("tuning", None)
    for key in flatten(tree):
        below.get("sources", {}).pop(key, None)  # the new value has another source
    return _laid_over(below, tree)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below`, with every value that `above` has replaced by that one, table by table."""
    tables = [key for key in above if isinstance(above[key], dict) and isinstance(below.get(key), dict)]
    return below | above | {key: _laid_over(below[key], above[key]) for key in tables}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one table with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parse_value(text: str) -> Any:
    """A TOML value; a bare word is a string. UserError for a number that is not finite."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--set: {text} is not a finite number")
    return value
