"""What the matrix shows while it runs, on stderr. Tables of commands are cli/tables.py's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upcycle_bench.matrix import Cell


def show_matrix(cells: Sequence[Cell], done: Sequence[Path | None], *, stderr: bool = True) -> None:
    """A row per strategy, a column per seed: what is done and what is to do."""
    rows: dict[str, dict[str, str]] = {}
    for cell, path in zip(cells, done, strict=True):
        row = rows.setdefault(cell.strategy, {"strategy": cell.strategy})
        row[f"seed {cell.seed}"] = "to do" if path is None else "done"
    table(f"protocol {cells[0].plan.protocol.name}", list(rows.values()), stderr=stderr)


class RunsBar:
    """How many runs are over and how long the rest will take, below the lines that they say."""

    def __init__(self, progress: Any, total: int) -> None:
        self.progress = progress
        self.task = progress.add_task("runs", total=total)

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def advance(self) -> None:
        """One run is over."""
        self.progress.advance(self.task)


@contextlib.contextmanager
def runs_bar(total: int) -> Iterator[RunsBar]:
    """The bar, on stderr; only the lines where stderr is no terminal."""
    from rich import console, progress

    stderr = console.Console(stderr=True)
    columns = [progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn()]
    times = [progress.TimeElapsedColumn(), progress.TimeRemainingColumn()]
    with progress.Progress(*columns, *times, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        yield RunsBar(bar, total)


def table(title: str, rows: Sequence[dict[str, str]], *, stderr: bool = False) -> None:
    """Rows with the same keys, which head the columns."""
    from rich import box
    from rich.console import Group
    from rich.markup import escape  # `cluster-aware[tau=0.8]` is no markup
    from rich.table import Table

    # On a narrow terminal these are folded, so that no digit of the others is cut off.
    wide = ("summary", "paper", "is", "from", "holds", "record or reason", "suite", "dataset", "metric")
    made = Table(
        title=escape(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )
    for column in rows[0] if rows else ["none"]:
        made.add_column(column, overflow="fold", no_wrap=column not in wide)
    for row in rows:
        made.add_row(*map(escape, row.values()))
    show(Group(made, ""), stderr=stderr)


def show(renderable: Any, *, stderr: bool = False) -> None:
    """Print what rich can render."""
    from rich.console import Console

    Console(highlight=False, stderr=stderr).print(renderable)
