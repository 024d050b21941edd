"""Rows as JSON and as a table, and the machine they were measured on.

write_json(rows, Path("tests/bench/latest.json"))
put_into(Path("docs/performance.md"), markdown(results, machine(settings)))
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.bench.floor import Rates
from tests.bench.rows import Row, Settings
from upcycle_bench.util import environment

KEYS = ("name", "goal", "value", "min", "max", "unit")
HEADER = ("#", "measured", "goal", "median", "least to greatest", "CPU time", "seconds", "floor of ours", "reached")
Results = Mapping[int, Sequence[Row] | str]  # by goal number; a text says why there is nothing


def write_json(results: Results, path: Path) -> None:
    """A list of {name, goal, value, min, max, unit}."""
    rows = [row for part in results.values() if not isinstance(part, str) for row in part]
    tree = [{key: asdict(row)[key] for key in KEYS} for row in rows]
    path.write_text(json.dumps(tree, indent=1, allow_nan=False) + "\n")


def cells(number: int, row: Row) -> list[str]:
    """One line of the table, as texts in the order of HEADER."""
    seconds = row.unit == "s"
    shown = "{:.2f} s" if seconds else "{:.2f}"
    reached = {True: "yes", False: "no", None: ""}[row.reached]
    return [
        str(number),
        row.name,
        row.goal + (" s" if seconds and row.goal else ""),
        shown.format(row.value),
        f"{row.min:.2f} to {row.max:.2f}",
        "" if row.cpu is None else shown.format(row.cpu),
        "" if row.sides is None else (" - " if seconds else " / ").join(map(_significant, row.sides)),
        "" if row.floor is None else _significant(row.floor),
        reached,
    ]


def _significant(seconds: float) -> str:
    return f"{seconds:.3g}"


def lines(results: Results, failures: Mapping[int, str]) -> list[list[str]]:
    """All lines of the table."""
    found: list[list[str]] = []
    for number, part in results.items():
        if not isinstance(part, str):
            found.extend(cells(number, row) for row in part)
        for text in (part if isinstance(part, str) else "", failures.get(number, "")):
            if text:
                found.append([str(number), text, *[""] * (len(HEADER) - 2)])
    return found


def markdown(results: Results, about: str, failures: Mapping[int, str] = MappingProxyType({})) -> str:
    """What stands in docs/performance.md; `failures` by goal number, after the rows that were made before."""
    table = [HEADER, ["---"] * len(HEADER), *lines(results, failures)]
    return about + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in table) + "\n"


def machine(settings: Settings, rates: Rates) -> str:
    """The machine, its measured rates, and the versions that matter, as one paragraph."""
    facts: dict[str, Any] = environment.capture(settings.device.type)
    names = ("torch", "deepspeed", "open_clip_torch", "faiss-cpu", "faiss-gpu", "numpy")
    versions = ", ".join(f"{name} {facts['packages'][name]}" for name in names if facts["packages"][name])
    speed = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {precision}" for precision, rate in rates.flops.items())
    memory = facts["memory_bytes"] / 2**30
    text = (
        f"{facts['device']}, {facts['cores']} cores, {settings.threads} threads, {memory:.0f} GiB; {speed}, "
        f"{rates.bandwidth / 1e9:.1f} GB/s (measured in the same run). Python {facts['python']}, {versions}. "
        f"{settings.rounds} rounds."
    )
    return text


def put_into(document: Path, text: str, name: str = "bench") -> None:
    """Replace what stands between the marks of that name in that file."""
    mark = re.compile(rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    before = document.read_text(encoding="utf-8")
    assert mark.search(before), f"{document} has no place for {name}"
    after = mark.sub(lambda match: match[1] + text + match[2], before)
    document.write_text(after, encoding="utf-8", newline="\n")
