"""What papers report, beside ours and never mixed: single runs, in points of percent.

    for row in read_published(Path("results/published")): row.strategy, row.setting, row.scores["in_val"]

A file is a CSV with the columns strategy (our name), arch, table and citation; every other column that holds numbers is
a score. `shift` is added where all shifts of ImageNet are there: their mean.
"""

from __future__ import annotations

import csv
import statistics
from dataclasses import dataclass
from pathlib import Path

from upcycle_bench.util.errors import UserError

SHIFTS = ("in_v2", "in_a", "in_r", "in_sketch", "objectnet")
WORDS = ("strategy", "arch", "table", "citation", "samples", "row_assignment")


@dataclass(frozen=True)
class PublishedRow:
    """One row of a paper's table. setting: architecture and table, within which rows compare."""

    strategy: str
    setting: str
    citation: str
    scores: dict[str, float]


def read_published(folder: Path) -> list[PublishedRow]:
    """All rows of all files; UserError for a folder without any, and for a file without these columns."""
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise UserError(f"no published results below {folder}: it holds no .csv file.")
    found = []
    for path in paths:
        with path.open(encoding="utf-8", newline="") as file:
            for place, row in enumerate(csv.DictReader(file), start=2):
                try:
                    scores = {name: float(text) for name, text in row.items() if name not in WORDS and text}
                    setting, citation = f"{row['arch']}, table {row['table']}", row["citation"]
                except (KeyError, ValueError, TypeError) as error:
                    raise UserError(f"{path}, line {place}: {error} (see results/published/README.md).") from None
                if all(name in scores for name in SHIFTS):
                    scores["shift"] = statistics.fmean(scores[name] for name in SHIFTS)
                found.append(PublishedRow(row["strategy"], setting, citation, scores))
    return found
