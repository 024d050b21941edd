"""Ranks over training seeds on the page: a table for readers without JavaScript, and what the chart draws.

(found,) = rankings_of([board], runs)       # headline score -> Ranking, or the line that says what it lacks
rank_tables(found)[0].rows                  # [("cluster-aware", "1.33", "a"), ...]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upcycle_bench.reporting.board import Board, Row
from upcycle_bench.reporting.comparable import comparable, counting_runs, table_of
from upcycle_bench.reporting.critical_difference import Ranking, rankings
from upcycle_bench.reporting.html.behind import Runs
from upcycle_bench.reporting.html.record_details import rounded

Rankings = Mapping[str, Ranking | str]


@dataclass(frozen=True)
class RankTable:
    """The mean ranks by one headline score. `rows`: strategy, mean rank, letters of its bars."""

    headline: str
    said: str
    rows: list[tuple[str, str, str]]


def rankings_of(boards: Sequence[Board], runs: Runs) -> list[Rankings]:
    """The rankings of each board, over all of its strategies, whichever rows it shows."""
    found = {
        table_of(records[0]): rankings(counting_runs(records)) for records in comparable([record for record, _ in runs])
    }
    return [found[board.table] if board.view == "steps" else {} for board in boards]


def rank_tables(found: Rankings) -> list[RankTable]:
    """A table for each headline score that has a ranking."""
    return [
        RankTable(
            headline,
            ranking.said(),
            [(label, f"{rank:.2f}", ranking.letters(label)) for label, rank in ranking.ranks.items()],
        )
        for headline, ranking in found.items()
        if isinstance(ranking, Ranking)
    ]


def missing(found: Rankings) -> list[str]:
    """The lines that say why there is no ranking."""
    return [f"{why}." for why in found.values() if isinstance(why, str)]


def chart_of(ranking: Ranking | str | None, rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any] | None:
    """The numbers of a chart for JSON; None without a ranking. `names`: of the rows, as charts show them."""
    if not isinstance(ranking, Ranking):
        return None
    shown = {row.label: (row.title, name) for row, name in zip(rows, names, strict=True)}
    return rounded(
        {
            "strategies": [
                {"title": shown[label][0], "name": shown[label][1], "rank": rank, "bars": ranking.letters(label)}
                for label, rank in ranking.ranks.items()
                if label in shown
            ],
            "bars": [[ranking.ranks[group[0]], ranking.ranks[group[-1]]] for group in ranking.groups],
            "distance": ranking.distance,
            "ranked": len(ranking.ranks),
            "said": ranking.said(),
        }
    )
