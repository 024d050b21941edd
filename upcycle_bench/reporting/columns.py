"""The columns of a leaderboard for people: all of them in groups, or the few that fit a terminal of 80 columns.

who, result, scores, cost, runs = column_groups(board)         # header -> one cell a row
columns = compact_columns(board)                                # rank, strategy, score, difference, verdict, cost
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from upcycle_bench.reporting.board import Board, Row, RowHeadline, SeedMean
from upcycle_bench.reporting.targets import Target
from upcycle_bench.suite import is_averaged

# The metrics in tables for people; csv and json have all metrics.
SHOWN = re.compile(r"acc1|(.*_)?(recall|r)@1|(text|image|group)_score", re.IGNORECASE)

Columns = dict[str, list[str]]  # header -> one cell per row


def column_groups(board: Board, metrics: Sequence[str] = ()) -> list[Columns]:
    """Columns for people in five groups: who, result, scores, cost, runs.

    `metrics`: words in the names of further scores.
    """
    rows = board.rows
    who = {"#": [str(row.rank or "-") for row in rows], "strategy": [row.title for row in rows]}
    result = {"n": [str(row.seeds) for row in rows]}
    for name in board.headlines:
        found = [row.headlines.get(name) for row in rows]
        means = [mean_cell(each.mean if each else None) for each in found]
        result[name + plus_minus(means)] = means
        if board.baseline:
            cells = [mean_cell(each.difference if each else None, "+") for each in found]
            cells = ["-" if row.label == board.baseline else cell for row, cell in zip(rows, cells, strict=True)]
            which = f"{name} " if len(board.headlines) > 1 else ""
            result[f"{which}{versus(board)}" + plus_minus(cells)] = cells
            result[f"{which}verdict"] = [each.verdict if each else "" for each in found]
        if name == next(iter(board.headlines)):
            result["rank (95 %)"] = [rank_cell(each) for each in found]
    every = {name for row in rows for name in row.scores}
    shown = sorted({*shown_scores(every, board), *shown_by(every, metrics)})
    scores = {name: [score_cell(row, name) for row in rows] for name in shown}
    cost = {
        "total parameters": [number_cell(row.parameters_total, ",.2f", "M") for row in rows],
        "active parameters": [number_cell(row.parameters_active, ",.2f", "M") for row in rows],
        "train s": [number_cell(row.train_seconds, ",.1f") for row in rows],
        "train FLOPs": [number_cell(row.train_flops, ".2e") for row in rows],
        **({"train kWh": [number_cell(_kwh(row), ".4g") for row in rows]} if any(map(_kwh, rows)) else {}),
        "charged FLOPs": [number_cell(row.charged_flops, ".2e") for row in rows],
        **{f"to {name}": [target_cell(row.targets.get(name)) for row in rows] for name in targets_of(board)},
        "tokens dropped": [number_cell(row.tokens_dropped, ".2%") for row in rows],
    }
    return [who, result, scores, cost, {"runs": [row.outcome for row in rows]}]


def compact_columns(board: Board, metrics: Sequence[str] = ()) -> Columns:
    """What a reader needs in ten seconds: rank, strategy, first headline score, difference, verdict and cost.

    `metrics`: words in the names of further scores.
    """
    rows, first = board.rows, next(iter(board.headlines), "")
    found = [row.headlines.get(first) for row in rows]
    columns = {
        "rank": [rank_cell(each) for each in found],
        "strategy": [row.short_title for row in rows],
        "n": [str(row.seeds) for row in rows],
        first or "score": [_short(each.mean if each else None) for each in found],
    }
    if board.baseline:
        columns["vs reference"] = [_short(each.difference if each else None, "+") for each in found]
    columns["verdict"] = [each.verdict if each else row.status for each, row in zip(found, rows, strict=True)]
    columns["FLOPs"] = ["" if ratio is None else f"{ratio:.2f}x" for ratio in board.flops_ratios]
    for name in shown_by({name for row in rows for name in row.scores}, metrics):
        columns[name] = [score_cell(row, name) for row in rows]
    return columns


def versus(board: Board) -> str:
    """What differences are to."""
    return f"vs {board.baseline}" + (" of as much compute" if board.view == "compute" else "")


def _short(value: SeedMean | None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value.mean:{sign}.4f}" + ("" if value.half_width is None else f"±{value.half_width:.4f}")


def rank_cell(headline: RowHeadline | None) -> str:
    """The interval of a rank, 1-3, or one rank; "-" where nothing is ranked."""
    if headline is None or headline.ranks is None:
        return "-"
    low, high = headline.ranks
    return str(low) if low == high else f"{low}-{high}"


def shown_by(columns: Iterable[str], metrics: Sequence[str]) -> list[str]:
    """The columns of scores whose names have one of these words."""
    return sorted(column for column in columns if any(word in column for word in metrics))


def shown_scores(columns: Iterable[str], board: Board) -> list[str]:
    """The columns of scores in tables for people; a mean over sets stands for its sets."""
    parts = {column: split_column(column) for column in columns}
    headline_of = {split_column(part)[:2]: name for name, each in board.headlines.items() for part in each.parts}
    names: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for suite, dataset, metric in parts.values():
        names[suite].add((dataset, metric))
    return sorted(
        column
        for column, (suite, dataset, metric) in parts.items()
        if SHOWN.fullmatch(metric)
        and not is_averaged(dataset, metric, headline_of.get((suite, dataset), ""), names[suite])
    )


def split_column(column: str) -> tuple[str, str, str]:
    """The suite, dataset and metric of a column; a dataset may hold slashes."""
    suite, _, rest = column.partition("/")
    dataset, _, metric = rest.rpartition("/")
    return suite, dataset, metric


def mean_cell(value: SeedMean | None, sign: str = "") -> str:
    """A mean with the half width of its interval, or with n where there is none; `sign` is of a difference."""
    if value is None:
        return ""
    interval = "" if value.half_width is None else f" ± {value.half_width:.4f}"
    n = f" (n={value.n})" if sign or value.half_width is None else ""
    return f"{value.mean:{sign}.4f}{interval}{n}"


def _kwh(row: Row) -> float | None:
    return None if row.train_joules is None else row.train_joules / 3.6e6


def targets_of(board: Board) -> list[str]:
    """The references to whose final score some row has a way."""
    return sorted({name for row in board.rows for name in row.targets})


def target_cell(target: Target | None) -> str:
    """Steps to a reference's final score, and charged FLOPs by those that it needed."""
    if target is None:
        return ""
    if target.steps is None:
        return "not reached"
    return f"{target.steps:,.0f} steps" + ("" if target.ratio is None else f", {target.ratio:.2f}x")


def plus_minus(cells: list[str]) -> str:
    """The meaning of ± for the header of a column: here an interval, in `run` and `evaluate` a standard error."""
    return " (± 95 %)" if any("±" in cell for cell in cells) else ""


def score_cell(row: Row, name: str) -> str:
    """A score with its standard error over samples in brackets."""
    error = row.standard_errors.get(name)
    return number_cell(row.scores.get(name), ".4f") + ("" if error is None else f" ({error:.4f})")


def number_cell(value: float | None, form: str, unit: str = "") -> str:
    """A number with its unit, M for millions; "" where it is unknown."""
    return "" if value is None else format(value / 1e6 if unit == "M" else value, form) + unit
