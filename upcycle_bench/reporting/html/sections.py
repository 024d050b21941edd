"""What the page shows of a board without JavaScript: sentences, and tables of text, which the template escapes.

section = section_of(board, behind, rankings)
section.columns["shift"][0].text        # "3.6043 ± 0.0120"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from upcycle_bench.reporting.board import Board, Row, RowHeadline
from upcycle_bench.reporting.captions import RESOLVED, caption, heading, verdicts
from upcycle_bench.reporting.columns import mean_cell, number_cell, rank_cell, target_cell, targets_of, versus
from upcycle_bench.reporting.html.behind import Behind, counting
from upcycle_bench.reporting.html.ranks import Rankings, RankTable, missing, rank_tables
from upcycle_bench.reporting.html.record_details import LAYER, layer_means

TITLES = {
    "function_drift": "function drift",
    "expert_cosine": "cosine of experts",
    "router_entropy": "router entropy, nats",
    "load": "busiest expert",
}


@dataclass(frozen=True)
class Cell:
    """A cell of the table. `order`: what it is sorted by; None stands last."""

    text: str
    order: float | str | None
    verdict: str = ""

    @property
    def resolved(self) -> bool:
        """Whether the difference is outside the noise."""
        return self.verdict in RESOLVED


@dataclass(frozen=True)
class Section:
    """A board on the page. Tables are header -> one cell for each row."""

    heading: str
    verdicts: list[str]
    caption: list[str]
    rows: tuple[Row, ...]
    columns: dict[str, list[Cell]]
    ranks: list[RankTable]
    diagnostics: dict[str, list[str]]


def section_of(board: Board, behind: Behind, rankings: Rankings) -> Section:
    """The section of this board. `behind`: the records of its rows; `rankings`: by its headline scores."""
    return Section(
        heading=heading(board),
        verdicts=verdicts(board),
        caption=[*caption(board), *missing(rankings)],
        rows=board.rows,
        columns=_columns(board),
        ranks=rank_tables(rankings),
        diagnostics=_diagnostics(board, behind),
    )


def _columns(board: Board) -> dict[str, list[Cell]]:
    """The columns behind the strategy's name, by header."""
    rows, first = board.rows, next(iter(board.headlines), "")
    columns = {"n": [Cell(str(row.seeds), row.seeds) for row in rows]}
    for name in board.headlines:
        found = [row.headlines.get(name) for row in rows]
        columns[name] = [Cell(mean_cell(each.mean), each.mean.mean) if each else Cell("", None) for each in found]
        if board.baseline:
            columns[f"{name} {versus(board)}"] = [_difference(each) for each in found]
    columns["charged FLOPs"] = [_cost(*each) for each in zip(rows, board.flops_ratios, strict=True)]
    for name in targets_of(board):
        ways = [row.targets.get(name) for row in rows]
        columns[f"to {name}"] = [Cell(target_cell(way), way.flops if way else None) for way in ways]
    columns["certified"] = [Cell(f"{row.certified} of {row.runs}", row.certified) for row in rows]
    columns["runs"] = [Cell(row.outcome, row.outcome) for row in rows]
    ranks = [row.headlines.get(first) for row in rows]
    order = [None if each is None or each.ranks is None else sum(each.ranks) / 2 for each in ranks]
    return {"rank": [Cell(rank_cell(each), place) for each, place in zip(ranks, order, strict=True)]} | columns


def _difference(headline: RowHeadline | None) -> Cell:
    if headline is None:
        return Cell("", None)
    if headline.difference is None:
        return Cell("", None, headline.verdict)
    return Cell(mean_cell(headline.difference, "+"), headline.difference.mean, headline.verdict)


def _cost(row: Row, ratio: float | None) -> Cell:
    """By the reference's; without a reference, as they are."""
    text = number_cell(row.charged_flops, ".2e") if ratio is None else f"{ratio:.2f}x"
    return Cell(text, row.charged_flops)


def _diagnostics(board: Board, behind: Behind) -> dict[str, list[str]]:
    """By row: what experts and routers were at step 0 and after training, as means over layers and runs that count."""
    columns: dict[str, list[str]] = {name: [] for name in ("strategy", *TITLES.values(), "tokens dropped")}
    for row in board.rows:
        runs = counting(behind[row.label])
        before = [layer_means(record.receipt) for record in runs]
        after = [layer_means(record.diagnostics) for record in runs]
        if not any(before + after):
            continue
        columns["strategy"].append(row.title)
        columns["tokens dropped"].append(number_cell(row.tokens_dropped, ".2%"))
        for name in LAYER:
            form = ".1%" if name == "load" else ".4f"
            means = [mean for part in (before, after) if (mean := _mean(part, name)) is not None]
            columns[TITLES[name]].append(" → ".join(number_cell(mean, form) for mean in means))
    return columns


def _mean(parts: Sequence[dict[str, float]], name: str) -> float | None:
    values = [part[name] for part in parts if name in part]
    return sum(values) / len(values) if values else None
