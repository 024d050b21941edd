"""Leaderboards as text, in four formats with the same rows: for a terminal, Markdown, csv and json.

print(render(boards, "terminal"))        # or "md", "csv", "json"
"""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial, reduce
from operator import or_
from typing import TYPE_CHECKING, Any

from upcycle_bench.reporting.board import Board
from upcycle_bench.reporting.captions import NOTES, caption, heading, verdicts
from upcycle_bench.reporting.columns import Columns, column_groups, compact_columns
from upcycle_bench.reporting.latex import latex
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import unknown

if TYPE_CHECKING:
    from rich.table import Table

FOLDED = 24  # characters of a strategy's name on one line, where a board needs several tables
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a label may hold what would steer a terminal
NUMBERS = 14  # characters of a score with its interval
FOLDED_SHORT = {"strategy": 17, "verdict": 9}  # the same where it has one table of few columns


def render(
    boards: list[Board], format: str, width: int | None = None, wide: bool = False, metrics: Sequence[str] = ()
) -> str:
    """The boards as text. Raises UserError for an unknown format.

    `width`: of the terminal, None to ask it. Where not all columns fit there, it has the few that a reader needs first;
    `wide`: it has all, in several tables. `metrics`: words in the names of scores that tables for people have, too.
    """
    writers: dict[str, Callable[[list[Board]], str]] = {
        "terminal": partial(_terminal, width=width, wide=wide, metrics=metrics),
        "md": partial(_markdown, metrics=metrics),
        "csv": _csv,
        "json": _json,
        "latex": partial(latex, metrics=metrics),
    }
    if format not in writers:
        raise unknown("format", format, writers)
    scores = {name for board in boards for row in board.rows for name in row.scores}
    for word in metrics:
        if not any(word in name for name in scores):
            raise unknown("metric", word, {name.rpartition("/")[2].partition("[")[0] for name in scores})
    return CONTROL.sub("?", writers[format](boards))


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table of the header and the lines below it, which have a cell for each column."""
    cells = ([cell.replace("|", "\\|") for cell in line] for line in (header, ["---"] * len(header), *lines))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def only(boards: list[Board], strategies: Sequence[str]) -> list[Board]:
    """The boards with the rows of these strategies, by name or label, and of the reference; all without a name.

    What is corrected for the whole table stays as it is. UserError for a strategy that no board has.
    """
    if not strategies:
        return boards
    known = {name for board in boards for row in board.rows for name in (row.strategy, row.label)}
    for name in strategies:
        if name not in known:
            raise unknown("strategy", name, known)
    wanted = set(strategies)

    def beside(board: Board) -> set[str | None]:
        return {board.baseline, *(row.peer for row in board.rows if {row.strategy, row.label} & wanted)}

    kept = [
        replace(
            board,
            rows=tuple(row for row in board.rows if {row.strategy, row.label} & wanted or row.label in beside(board)),
        )
        for board in boards
    ]
    return [board for board in kept if any({row.strategy, row.label} & wanted for row in board.rows)]


def _terminal(boards: list[Board], width: int | None, wide: bool, metrics: Sequence[str]) -> str:
    """One table for each board, or several for all columns on a terminal that is too narrow."""
    from rich.console import Console
    from rich.measure import Measurement

    output = io.StringIO()
    console = Console(file=output, width=width, color_system=None)

    def fits(columns: Columns) -> bool:
        table = _rich_table(columns)
        return Measurement.get(console, console.options.update(width=100_000), table).maximum <= console.width

    for board in boards:
        who, *groups = column_groups(board, metrics)
        tables = [reduce(or_, groups, who)]
        short = not wide and not fits(tables[0])
        if short:
            columns = compact_columns(board, metrics)
            columns |= {name: _folded(columns[name], most) for name, most in FOLDED_SHORT.items()}
            first = {name: columns.pop(name) for name in ("rank", "strategy")}
            tables = _split_to_fit(first, [{_two_lines(name): cells} for name, cells in columns.items()], fits)
        elif not fits(tables[0]):
            tables = _split_to_fit(who | {"strategy": _folded(who["strategy"], FOLDED)}, groups, fits)
        lines = [*caption(board, whole=not short), *(_runs(board) if short else [])]
        console.print(heading(board), *verdicts(board), *map(_rich_table, tables), *lines, "", sep="\n", markup=False)
    console.print(*NOTES, sep="\n", markup=False)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()) + "\n"


def _two_lines(header: str) -> str:
    """A header that is no wider than the numbers below it, if it has a hyphen there."""
    return header if len(header) <= NUMBERS else header.replace("-", "-\n", 1)


def _folded(titles: Iterable[str], width: int) -> list[str]:
    return [textwrap.fill(title, width, break_on_hyphens=True) for title in titles]


def _runs(board: Board) -> list[str]:
    """How the runs of each strategy ended, where that is not simply well; and where the other columns are."""
    ended = [f"{row.label}: {row.outcome}." for row in board.rows if row.outcome != "ok"]
    footing = [f"{row.label}: {row.kind.partition('; ')[2]}." for row in board.rows if "; " in row.kind]
    reference = f"Reference: {board.baseline}. " if board.baseline else ""
    return [*footing, *ended, f"{reference}FLOPs: charged ones, by those of the reference. More columns: --wide."]


def _markdown(boards: list[Board], metrics: Sequence[str]) -> str:
    blocks = []
    for board in boards:
        columns = reduce(or_, column_groups(board, metrics))
        cells = (map(_plain, line) for line in zip(*columns.values(), strict=True))
        table = markdown_table(list(map(_plain, columns)), map(list, cells))
        below = "\n".join(f"- {sentence}" for sentence in caption(board))
        above = "\n".join(map(_plain, verdicts(board)))
        blocks.append("\n\n".join(filter(None, [f"### {heading(board)}", above, table, below])))
    return "\n\n".join([*blocks, *NOTES]) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line; `markdown_table` takes care of |."""
    return re.sub(r"([\\`*<>])", r"\\\1", " ".join(text.split()))


def _cell(value: Any) -> Any:
    """What a table calculator takes for text, too."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _csv(boards: list[Board]) -> str:
    """One flat table. Each row repeats the facts of its board, and has a column for every score of any board."""
    names = sorted({name for board in boards for row in board.rows for name in row.scores})
    lines = []
    for board in boards:
        facts = asdict(board) | {
            "overrides": " ".join(board.overrides),
            "headlines": " ".join(board.headlines),
            "suite_fingerprints": " ".join(f"{suite}={value}" for suite, value in board.suite_fingerprints.items()),
        }
        del facts["rows"]
        for row in board.rows:
            line = {f"board_{key}": value for key, value in facts.items()}
            for key, value in asdict(row).items():
                if key == "headlines":
                    line |= {f"{name} {part}": number for name in value for part, number in _flat(value[name])}
                elif key == "targets":
                    line |= {f"to {name} {part}": number for name in value for part, number in value[name].items()}
                elif key == "records":
                    line[key] = " ".join(value)
                elif key == "scores":
                    line |= {name: value.get(name) for name in names}
                elif key == "standard_errors":
                    line |= {f"{name} standard error": value.get(name) for name in names}
                else:
                    line[key] = value
            lines.append(line)
    output = io.StringIO()
    header = dict.fromkeys(name for line in lines for name in line)  # boards may have other headline scores
    writer = csv.DictWriter(output, list(header), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in line.items()} for line in lines)
    return output.getvalue()


def _flat(headline: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """The numbers and words of a row's headline score and of its difference, by name."""
    for key, value in headline.items():
        if key in ("mean", "difference"):
            prefix = "" if key == "mean" else f"{key} "
            yield from ((prefix + part, (value or {}).get(part)) for part in ("mean", "half_width", "n"))
        elif key == "ranks":
            yield from zip(("rank low", "rank high"), value or (None, None), strict=True)
        else:
            yield key.replace("_", " "), value


def _json(boards: list[Board]) -> str:
    document = {"notes": NOTES, "boards": [asdict(board) | {"caption": caption(board)} for board in boards]}
    return strict_json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _split_to_fit(who: Columns, groups: Iterable[Columns], fits: Callable[[Columns], bool]) -> list[Columns]:
    """As few tables as fit, each with the columns `who`. A group without room in the last table begins a new one."""
    tables = [who]
    for group in groups:
        if fits(tables[-1] | group):
            tables[-1] = tables[-1] | group
            continue
        tables.append(who)
        for header, cells in group.items():
            if len(tables[-1]) > len(who) and not fits(tables[-1] | {header: cells}):
                tables.append(who)
            tables[-1] = tables[-1] | {header: cells}
    return [table for table in tables if len(table) > len(who)]


def _rich_table(columns: Columns) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text  # labels hold brackets, which rich would read as markup

    table = Table(box=box.SIMPLE, collapse_padding=True)
    for header in columns:
        left = header in ("strategy", "runs", "verdict")  # only these columns fold, so that numbers stay whole
        lines = re.sub(r"/| (?![\d%])|_(?=retrieval)|(?<=retrieval)_", "\n", header)
        table.add_column(Text(lines), justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    return table
