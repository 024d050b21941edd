"""Leaderboards as text, in four formats with the same rows: for a terminal, Markdown, csv and json.

print(render(boards, "terminal"))        # or "md", "csv", "json"
"""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial, reduce
from operator import or_
from typing import TYPE_CHECKING, Any

from upcycle_bench.reporting.columns import Columns, column_groups, compact_columns, shown_scores, split_column
from upcycle_bench.reporting.latex import latex
from upcycle_bench.reporting.leaderboard import GUEST, Board
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import unknown

if TYPE_CHECKING:
    from rich.table import Table

LOG_RANK = "log_rank"  # as `evaluation.ranking` calls it
FOLDED = 24  # characters of a strategy's name on one line, where a board needs several tables
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a label may hold what would steer a terminal
NUMBERS = 14  # characters of a score with its interval
FOLDED_SHORT = {"strategy": 17, "verdict": 9}  # the same where it has one table of few columns
NOTES = (
    "± is the half width of a 95 % Student-t confidence interval over n training seeds (several initialisations of one "
    "training seed are averaged first) and, where the records have outcomes, evaluation samples. Over few seeds such "
    "an interval is wide; over one (n=1) there is none.",
    "Verdicts are about the difference to the reference: better or worse where p < 0.05 (Holm's, over the strategies "
    "of the table, for each score alone), tied where the interval is within one run's standard deviation over seeds, "
    "else undecided. With fewer than three seeds nothing is ranked; # is the place of the mean alone.",
    "In parentheses behind other metrics: the standard error over evaluation samples, where the records have it.",
    "Differences are paired by initialisation and training seed; their n counts the training seeds with a pair.",
    "Charged FLOPs: all phases before evaluation, and of a tuned row all runs of its tuning. Times and FLOPs are means "
    "per run.",
)


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
    kept = [
        replace(
            board,
            rows=tuple(row for row in board.rows if {row.strategy, row.label} & wanted or row.label == board.baseline),
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
        lines = [*caption(board), *(_runs(board) if short else [])]
        console.print(heading(board), *map(_rich_table, tables), *lines, "", sep="\n", markup=False)
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
        blocks.append(f"### {heading(board)}\n\n{table}\n\n{below}")
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


def heading(board: Board) -> str:
    """What the runs of this board have in common."""
    suites = "".join(f", {suite} {fingerprint[:8]}" for suite, fingerprint in board.suite_fingerprints.items())
    where = f"training {board.training_fingerprint[:8]}{suites}, dense {board.dense[:8]}"
    return f"{board.protocol}, {board.division} division ({where})"


def caption(board: Board) -> list[str]:
    """Sentences about the numbers of this board; NOTES are about those of all boards."""
    sentences = []
    if board.division == "open":
        settings = [" ".join(f"--set {override}" for override in board.overrides), board.unequal or ""]
        what = "; ".join(filter(None, settings)) or "options off the protocol's defaults."
        sentences.append(f"Open division, not to be compared with other tables: {what}")
    if any(row.guest for row in board.rows):
        sentences.append(f"Rows marked {GUEST} ran and were scored alike; here they are what the others compare with.")
    for name, headline in board.headlines.items():
        direction = f"{'higher' if headline.higher_is_better else 'lower'} is better"
        chance = "" if headline.chance is None else f", chance is {headline.chance:.4f}"
        sentences.append(f"{name}: mean of {_parts(headline.parts)}; {direction}{chance}.")
    if len(board.headlines) > 1:
        sentences.append(f"Ranks are by {next(iter(board.headlines))}; the headline scores are never mixed.")
    if any(
        split_column(part)[2].endswith(LOG_RANK) for headline in board.headlines.values() for part in headline.parts
    ):
        sentences.append("log_rank: mean ln(1 + wrong answers nearer than the right one); e to it is a geometric mean.")
    if board.baseline:
        sentences.append(f"vs {board.baseline}: the score minus that of {board.baseline}.")
    if alone := [name for name in board.headlines if name not in board.over_samples]:
        sentences.append(
            f"Intervals of {', '.join(alone)} are over training seeds alone: not all runs have outcomes of each sample."
        )
    every = [(name, each.standard_error) for row in board.rows for name, each in row.headlines.items()]
    errors = [(name, error) for name, error in every if error is not None]
    if errors:
        names = [name for name in board.headlines if name in dict(errors)]
        most = ", ".join(f"{name} {max(error for other, error in errors if other == name):.4f}" for name in names)
        sentences.append(
            f"Over evaluation samples the standard error is at most: {most}; rows share the samples, so their "
            "differences are surer."
        )
    scored = {name for row in board.rows for name in row.scores}
    parts = [part for headline in board.headlines.values() for part in headline.parts]
    shown = {split_column(name)[0] for name in (*shown_scores(scored, board), *parts)}
    if scored and (hidden := sorted(board.suite_fingerprints.keys() - shown)):
        sentences.append(
            f"No column here for {', '.join(hidden)}: scores are in csv and json, all they say in the records."
        )
    runs = sum(row.runs for row in board.rows)
    if without := runs - sum(row.certified for row in board.rows):
        sentences.append(
            f"There are {without} of {runs} runs without a certificate of their evaluation (docs/protocols.md)."
        )
    return sentences


def _parts(columns: tuple[str, ...]) -> str:
    """Up to four scores by name; more of them grouped by suite and metric."""
    if len(columns) <= 4:
        return ", ".join(columns)
    suites: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for column in columns:
        suite, dataset, metric = split_column(column)
        suites[suite][metric].append(dataset)
    groups = [
        f"{suite} " + "; ".join(f"{metric} on {', '.join(datasets)}" for metric, datasets in sorted(metrics.items()))
        for suite, metrics in suites.items()
    ]
    return f"{len(columns)} scores ({'; '.join(groups)})"


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
