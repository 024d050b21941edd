"""Records -> leaderboards: one per set of runs that may be compared, in four formats with the same rows.

    boards = build([read(path) for path in find(folder)])
    print(render(boards, "terminal"))        # or "md", "csv", "json"

A value of a row is first made per training seed (initialisations of one training seed are averaged, since they are not
independent of each other), then averaged; n counts training seeds, and the interval is Student's t over them.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from upcycle_bench.errors import UserError, unknown
from upcycle_bench.record import Record, ScoreRecord
from upcycle_bench.suite import AVERAGE

if TYPE_CHECKING:
    from rich.table import Table

FORMATS = ("terminal", "md", "csv", "json")
BASELINES = ("sparse-upcycling", "dense")  # differences are to the first of these that has a successful run
SHOWN = re.compile(r"acc1|(.*_)?(recall|r)@1", re.IGNORECASE)  # metrics in tables for people; csv and json have all
NOTES = (
    "± is the half width of a 95 % Student-t confidence interval over n training seeds (several initialisations of one "
    "training seed are averaged first). Over few seeds such an interval is wide; over one (n=1) there is none.",
    "Differences are paired by initialisation and training seed; their n counts the training seeds with a pair.",
    "Charged FLOPs: all phases before evaluation. Times and FLOPs are means per run.",
)

Seeds = tuple[int, int]  # initialisation, training


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` training seeds and the half width of its 95 % confidence interval (None for one seed)."""

    mean: float
    half_width: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One strategy label: means over its runs that count. Values are None where no run succeeded."""

    rank: int | None
    label: str
    strategy: str
    kind: str  # what the row is marked with: reconstructed, parts reconstructed, control, unpublished; "": published
    primary: Estimate | None
    difference: Estimate | None  # to the baseline, paired by both seeds
    scores: dict[str, float]  # suite/dataset/metric -> mean
    parameters_total: int | None
    parameters_active: int | None
    train_seconds: float | None
    train_flops: float | None
    charged_flops: float | None  # every phase before evaluation
    tokens_dropped: float | None
    runs: int  # that count
    failed: int
    superseded: int
    mixed: bool  # the runs that count differ in configuration or plugin version
    status: str  # "ok", or how the newest run ended if none succeeded
    reason: str | None

    @property
    def title(self) -> str:
        """The label with its mark."""
        return f"{self.label} ({self.kind})" if self.kind else self.label

    @property
    def outcome(self) -> str:
        """What became of the runs, in words."""
        failed = [f"{self.failed} failed"] if self.failed else []
        if self.primary is None:
            reason = textwrap.shorten(self.reason or "", 80, placeholder=" ...")
            return f"{self.status}: {reason}" + (f" ({failed[0]})" if self.failed > 1 else "")
        superseded = [f"{self.superseded} superseded"] if self.superseded else []
        mixed = ["mixes configurations or versions"] if self.mixed else []
        return ", ".join(["ok", *failed, *superseded, *mixed])


@dataclass(frozen=True, kw_only=True)
class Board:
    """Runs with equal protocol, division, fingerprints and dense model."""

    protocol: str
    division: str
    overrides: tuple[str, ...]
    unequal: str | None
    training_fingerprint: str
    suite_fingerprints: dict[str, str]
    dense: str
    primary: tuple[str, ...]  # the scores whose mean is the primary score
    baseline: str | None
    rows: tuple[Row, ...]


def build(records: list[Record]) -> list[Board]:
    """Boards, sorted by protocol, closed division first. Raises UserError without records."""
    if not records:
        raise UserError("a leaderboard needs records: there are none.")
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: (r.created_at, r.run_id)):  # so the last of every list is the newest
        protocol = record.protocol
        suites = tuple(sorted(protocol.suite_fingerprints.items()))
        key = (protocol.name, protocol.division, protocol.training_fingerprint, suites, record.hashes.dense)
        groups[key].append(record)
    return [_board(groups[key]) for key in sorted(groups)]


def estimate(by_training_seed: Mapping[int, list[float]]) -> Estimate:
    """Mean and Student-t interval over training seeds, from the values of each seed's runs."""
    values = [statistics.fmean(of_one_seed) for of_one_seed in by_training_seed.values()]
    n = len(values)
    if n == 1:
        return Estimate(values[0], None, 1)
    from scipy.special import stdtrit  # quantile of Student's t

    half_width = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)
    return Estimate(statistics.fmean(values), half_width, n)


def _board(records: list[Record]) -> Board:
    """`records` are the board's own, oldest first."""
    by_label: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_label[record.strategy.label].append(record)
    # Of several successes with the same seeds the newest counts.
    counting = {
        label: {(run.seeds.init, run.seeds.train): run for run in runs if run.status == "ok"}
        for label, runs in by_label.items()
    }
    baseline = next((label for label in BASELINES if counting.get(label)), None)
    rows = [
        _row(runs, counting[label], counting[baseline] if baseline and label != baseline else {})
        for label, runs in by_label.items()
    ]
    rows.sort(key=lambda row: (row.primary is None, -row.primary.mean if row.primary else 0.0, row.label))
    newest = records[-1]
    return Board(
        protocol=newest.protocol.name,
        division=newest.protocol.division,
        overrides=newest.protocol.overrides,
        unequal=newest.protocol.unequal,
        training_fingerprint=newest.protocol.training_fingerprint,
        suite_fingerprints=dict(sorted(newest.protocol.suite_fingerprints.items())),
        dense=newest.hashes.dense,
        primary=tuple(sorted({_column(s) for r in records if r.status == "ok" for s in r.scores if s.primary})),
        baseline=baseline,
        rows=tuple(replace(row, rank=rank) if row.primary else row for rank, row in enumerate(rows, start=1)),
    )


def _row(runs: list[Record], counting: dict[Seeds, Record], base: dict[Seeds, Record]) -> Row:
    """`runs` are all of one label, oldest first; `counting` its successes that count, `base` the baseline's."""
    primary: dict[int, list[float]] = defaultdict(list)
    difference: dict[int, list[float]] = defaultdict(list)
    scores: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seeds, run in sorted(counting.items()):
        assert run.primary is not None, "a run that is ok has a primary score"
        primary[seeds[1]].append(run.primary)
        if seeds in base:
            difference[seeds[1]].append(run.primary - (base[seeds].primary or 0.0))
        for score in run.scores:
            scores[_column(score)][seeds[1]].append(score.value)
    failures = [run for run in runs if run.status != "ok"]
    newest = runs[-1]
    sources = {json.dumps(run.strategy.model_dump(mode="json"), sort_keys=True) for run in counting.values()}
    costs = [run.cost for run in counting.values() if run.cost]
    return Row(
        rank=None,
        label=newest.strategy.label,
        strategy=newest.strategy.name,
        kind=_mark(newest),
        primary=estimate(primary) if primary else None,
        difference=estimate(difference) if difference else None,
        scores={name: estimate(values).mean for name, values in sorted(scores.items())},
        parameters_total=costs[0].parameters_total if costs else None,
        parameters_active=costs[0].parameters_active if costs else None,
        train_seconds=_mean(cost.phases["train"].seconds if "train" in cost.phases else 0 for cost in costs),
        train_flops=_mean(cost.phases["train"].flops if "train" in cost.phases else 0 for cost in costs),
        charged_flops=_mean(
            _sum(phase.flops for name, phase in cost.phases.items() if name != "evaluate") for cost in costs
        ),
        tokens_dropped=_mean(cost.tokens_dropped for cost in costs),
        runs=len(counting),
        failed=len(failures),
        superseded=len(runs) - len(failures) - len(counting),
        mixed=len(sources) > 1,
        status="ok" if counting else newest.status,
        reason=None if counting else newest.reason,
    )


def _mark(record: Record) -> str:
    """A reconstruction says so wherever its name stands, in whole or in part."""
    if record.strategy.status == "published":
        return "parts reconstructed" if record.strategy.reconstructed else ""
    return record.strategy.status


def _column(score: ScoreRecord) -> str:
    return f"{score.suite}/{score.dataset}/{score.metric}"


def _split(column: str) -> tuple[str, str, str]:
    """The suite, dataset and metric of a column."""
    suite, _, rest = column.partition("/")
    dataset, _, metric = rest.rpartition("/")
    return suite, dataset, metric


def _sum(values: Iterable[int | None]) -> int | None:
    """None if any is unknown: a sum of the rest would look cheaper than it was."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def _mean(values: Iterable[float | None]) -> float | None:
    """None if any is unknown, or there is none."""
    known = list(values)
    return statistics.fmean(value for value in known if value is not None) if known and None not in known else None


# ---- formats ---------------------------------------------------------------------------------------------------


def render(boards: list[Board], format: str, width: int | None = None) -> str:
    """The boards as text; `width` is the terminal's (default: as found). Raises UserError for an unknown format."""
    writers = {"terminal": lambda: _terminal(boards, width), "md": lambda: _markdown(boards)}
    writers |= {"csv": lambda: _csv(boards), "json": lambda: _json(boards)}
    if format not in writers:
        raise unknown("format", format, FORMATS)
    return writers[format]()


def _heading(board: Board) -> str:
    suites = "".join(f", {suite} {fingerprint[:8]}" for suite, fingerprint in board.suite_fingerprints.items())
    where = f"training {board.training_fingerprint[:8]}{suites}, dense {board.dense[:8]}"
    return f"{board.protocol}, {board.division} division ({where})"


def _caption(board: Board) -> list[str]:
    """What this board's numbers are, in sentences; NOTES holds for all boards."""
    lines = [f"Primary: mean of {_parts(board.primary)}; higher is better."] if board.primary else []
    if board.division == "open":
        settings = [" ".join(f"--set {override}" for override in board.overrides), board.unequal or ""]
        lines.insert(0, f"Open division, not to be compared with other tables: {'; '.join(filter(None, settings))}")
    if board.baseline:
        lines.append(f"vs {board.baseline}: the primary minus that of {board.baseline}.")
    return lines


def _parts(primary: tuple[str, ...]) -> str:
    """The primary scores: a few by their names, more than four as sets grouped by metric."""
    if len(primary) <= 4:
        return ", ".join(primary)
    suites: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for column in primary:
        suite, dataset, metric = _split(column)
        suites[suite][metric].append(dataset)
    groups = [
        f"{suite} " + "; ".join(f"{metric} on {', '.join(datasets)}" for metric, datasets in sorted(metrics.items()))
        for suite, metrics in suites.items()
    ]
    return f"{len(primary)} scores ({'; '.join(groups)})"


def _shown(columns: Iterable[str]) -> list[str]:
    """The columns of scores in tables for people."""
    parts = {column: _split(column) for column in columns}
    averaging = {suite for suite, dataset, _ in parts.values() if dataset == AVERAGE}
    return sorted(
        column
        for column, (suite, dataset, metric) in parts.items()
        if SHOWN.fullmatch(metric) and (dataset == AVERAGE or suite not in averaging)
    )


def _people(board: Board) -> list[dict[str, list[str]]]:
    """Columns of text for people, header -> one cell per row, in groups: who, result, metrics, cost, runs."""
    rows = board.rows
    who = {"#": [str(row.rank or "-") for row in rows], "strategy": [row.title for row in rows]}
    result = {
        "n": [str(row.primary.n if row.primary else 0) for row in rows],
        "primary": [_text(r.primary) for r in rows],
    }
    if board.baseline:
        is_base = [row.label == board.baseline for row in rows]
        differences = [_text(row.difference, "+") for row in rows]
        result[f"vs {board.baseline}"] = [
            "-" if base else text for base, text in zip(is_base, differences, strict=True)
        ]
    shown = _shown({name for row in rows for name in row.scores})
    scores = {name: [_number(row.scores.get(name), ".4f") for row in rows] for name in shown}
    cost = {
        "total parameters": [_number(row.parameters_total, ",.2f", "M") for row in rows],
        "active parameters": [_number(row.parameters_active, ",.2f", "M") for row in rows],
        "train s": [_number(row.train_seconds, ",.1f") for row in rows],
        "train FLOPs": [_number(row.train_flops, ".2e") for row in rows],
        "charged FLOPs": [_number(row.charged_flops, ".2e") for row in rows],
        "tokens dropped": [_number(row.tokens_dropped, ".2%") for row in rows],
    }
    return [who, result, scores, cost, {"runs": [row.outcome for row in rows]}]


def _text(value: Estimate | None, sign: str = "") -> str:
    if value is None:
        return ""
    interval = "" if value.half_width is None else f" ± {value.half_width:.4f}"
    n = f" (n={value.n})" if sign or value.half_width is None else ""
    return f"{value.mean:{sign}.4f}{interval}{n}"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value / 1e6 if unit == "M" else value, form) + unit


def _terminal(boards: list[Board], width: int | None) -> str:
    """One table per board; where the terminal is too narrow for it, one for each group of columns."""
    from rich.console import Console
    from rich.measure import Measurement

    output = io.StringIO()
    console = Console(file=output, width=width, color_system=None)
    for board in boards:
        who, *groups = _people(board)
        tables = [_rich_table({key: cells for group in (who, *groups) for key, cells in group.items()})]
        if Measurement.get(console, console.options.update(width=100_000), tables[0]).maximum > console.width:
            tables = [_rich_table(who | group) for group in groups if group]
        console.print(_heading(board), *tables, *_caption(board), "", sep="\n", markup=False)
    console.print(*NOTES, sep="\n", markup=False)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()) + "\n"


def _rich_table(columns: dict[str, list[str]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text  # labels hold brackets, which rich would read as markup

    table = Table(box=box.SIMPLE, collapse_padding=True)
    for header in columns:
        left = header in ("strategy", "runs")  # only these two fold; numbers stay whole
        lines = re.sub("[/ ]|_(?=retrieval)|(?<=retrieval)_", "\n", header)
        table.add_column(Text(lines), justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    return table


def _markdown(boards: list[Board]) -> str:
    blocks = []
    for board in boards:
        columns = {header: cells for group in _people(board) for header, cells in group.items()}
        lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
        table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        blocks.append("\n".join([f"### {_heading(board)}", "", *table, "", *(f"- {line}" for line in _caption(board))]))
    return "\n\n".join([*blocks, *NOTES]) + "\n"


def _csv(boards: list[Board]) -> str:
    """One flat table: a board's facts are repeated in each of its rows; scores of any board are columns of all."""
    names = sorted({name for board in boards for row in board.rows for name in row.scores})
    lines = []
    for board in boards:
        facts = asdict(board) | {"overrides": " ".join(board.overrides), "primary": " ".join(board.primary)}
        suites = " ".join(f"{suite}={fingerprint}" for suite, fingerprint in board.suite_fingerprints.items())
        facts = {f"board_{key}": value for key, value in facts.items() if key != "rows"}
        for row in board.rows:
            line = facts | {"board_suite_fingerprints": suites}
            for key, value in asdict(row).items():
                if key in ("primary", "difference"):
                    line |= {f"{key}_{part}": (value or {}).get(part) for part in ("mean", "half_width", "n")}
                elif key == "scores":
                    line |= {name: value.get(name) for name in names}
                else:
                    line[key] = value
            lines.append(line)
    output = io.StringIO()
    writer = csv.DictWriter(output, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return output.getvalue()


def _json(boards: list[Board]) -> str:
    document = {"notes": NOTES, "boards": [asdict(board) | {"caption": _caption(board)} for board in boards]}
    return json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
