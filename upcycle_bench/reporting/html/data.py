"""What the page's script draws and what its drawer shows: numbers of each row, and the records behind it, for JSON.

tree = data_of(boards, records_of(boards, runs), rankings_of(boards, runs), nothing_published)
tree["boards"][0]["rows"][0]["records"][0]["command"]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from upcycle_bench.reporting.board import Board, Row, RowHeadline
from upcycle_bench.reporting.columns import mean_cell, split_column, versus
from upcycle_bench.reporting.html.behind import Behind, Runs, counting
from upcycle_bench.reporting.html.ranks import Rankings, chart_of
from upcycle_bench.reporting.html.record_details import RecordDetails, rounded
from upcycle_bench.reporting.published import Published

FEW = 300  # records, up to which the page holds whole receipts
POINTS, ALL_POINTS = 200, 60_000  # of one training curve, and of all together


Publisher = Callable[[Row], Sequence[Published]]


def nothing_published(row: Row) -> Sequence[Published]:
    """No paper's numbers."""
    del row
    return ()


def data_of(
    boards: Sequence[Board], behind: Sequence[Behind], rankings: Sequence[Rankings], published: Publisher
) -> dict[str, Any]:
    """The data of all boards. `behind`: of each, the records of its rows; `published`: what papers report of a row."""
    runs = sum(len(mine) for each in behind for mine in each.values())
    details = RecordDetails(points=max(2, min(POINTS, ALL_POINTS // max(1, runs))), receipts=runs <= FEW)
    return {
        "boards": [_board(*each, details, published) for each in zip(boards, behind, rankings, strict=True)],
        "shared": details.shared,
    }


def _board(
    board: Board, behind: Behind, rankings: Rankings, details: RecordDetails, published: Publisher
) -> dict[str, Any]:
    names = [row.short_title for row in board.rows]
    rows = {row.label: row for row in board.rows}
    return {
        "reference": board.baseline and versus(board).removeprefix("vs "),
        "headlines": [
            {
                "name": name,
                "higher": headline.higher_is_better,
                "parts": _short_names(headline.parts),
                "ranking": chart_of(rankings.get(name), board.rows, names),
            }
            for name, headline in board.headlines.items()
        ],
        "rows": [
            {
                "title": row.title,
                "name": name,
                "headlines": {title: _numbers(each) for title, each in row.headlines.items()},
                "flops": row.charged_flops,
                "ratio": ratio,
                "isReference": row.label == board.baseline,
                "peer": row.peer,
                "differences": {
                    title: _by_dataset(row, rows[row.peer], board.headlines[title].parts)
                    for title in row.headlines
                    if row.peer not in (None, row.label) and row.peer in rows
                },
                "published": [asdict(each) for each in published(row)],
                **_of_records(behind[row.label], details),
            }
            for row, name, ratio in zip(board.rows, names, board.flops_ratios, strict=True)
        ],
    }


def _by_dataset(row: Row, base: Row, parts: Sequence[str]) -> list[float | None]:
    """Each part of a headline score minus the other's: of two means, whose runs need not be pairs."""
    both = row.scores.keys() & base.scores.keys()
    return [rounded(row.scores[part] - base.scores[part]) if part in both else None for part in parts]


def _numbers(headline: RowHeadline) -> dict[str, Any]:
    difference = headline.difference
    return rounded(
        {
            "mean": headline.mean.mean,
            "half": headline.mean.half_width,
            "n": headline.mean.n,
            "difference": difference and mean_cell(difference, "+"),
            "verdict": headline.verdict,
            "p": headline.p,
            "tied": headline.letters,
            "ofInit": headline.of_init,
            "ofTrain": headline.of_train,
        }
    )


def _of_records(runs: Runs, details: RecordDetails) -> dict[str, Any]:
    """The records of a row, newest first, and the curves of those that count."""
    valid = {id(record) for record in counting(runs)}
    records, curves, held_out = [], [], []
    for record, path in reversed(runs):
        counts = id(record) in valid
        said = "counts" if counts else "failed" if record.status != "ok" else "superseded by a newer run"
        records.append(details.of(record, path, said))
        if counts and (curve := details.curve(path)):
            curves.append(curve)
        if counts and (scores := details.held_out(record)):
            held_out.append(scores)
    return {"records": records, "curves": curves, "heldOut": held_out}


def _short_names(columns: Sequence[str]) -> list[str]:
    """Scores by dataset and metric; by suite, too, where there are several."""
    suites = {split_column(column)[0] for column in columns}
    return [column if len(suites) > 1 else column.partition("/")[2] for column in columns]
