"""What papers report, beside ours and never mixed: single runs, in points of percent.

    for row in read_published(Path("results/published")): row.strategy, row.setting, row.scores["in_val"]

A file is a CSV with the columns strategy (our name), arch, table and citation; every other column that holds numbers is
a score. `shift` is added where all shifts of ImageNet are there: their mean.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from upcycle_bench.reporting.board import Row
from upcycle_bench.util.errors import UserError

SHIFTS = ("in_v2", "in_a", "in_r", "in_sketch", "objectnet")
SHOWN = ("in_val", "shift", "coco_avg")  # beside a row of ours
CAVEAT = "a single run, in percent, of another model and other data than these"
WORDS = ("strategy", "arch", "table", "citation", "samples", "row_assignment")


@dataclass(frozen=True)
class PublishedRow:
    """One row of a paper's table. setting: architecture and table, within which rows compare."""

    strategy: str
    setting: str
    citation: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Published:
    """A number of a paper, as the HTML report shows it beside a row of ours."""

    what: str  # such as "in_val of ViT-B/32, table main"
    value: str
    citation: str
    caveat: str


def beside(rows: Sequence[PublishedRow], row: Row) -> list[Published]:
    """What papers report of the strategy of a row of ours; a setting that two tables repeat stands once."""
    found = {
        (each.setting.partition(",")[0], name): Published(
            f"{name} of {each.setting}", f"{value:g}", each.citation, CAVEAT
        )
        for each in reversed(rows)
        if each.strategy == row.label
        for name, value in each.scores.items()
        if name in SHOWN
    }
    return [found[key] for key in sorted(found)]


def read_published(folder: Path) -> list[PublishedRow]:
    """All rows of all files; UserError for a folder without any, and for a file without these columns."""
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise UserError(f"no published results below {folder}: it holds no .csv file; --published FOLDER has some.")
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
