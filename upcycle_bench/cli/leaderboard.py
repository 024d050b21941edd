"""`upcycle-bench leaderboard`: records as tables. Imports nothing heavy."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from upcycle_bench.cli.common import Json, writable_file
from upcycle_bench.util.errors import UserError


class Format(str, Enum):
    """Leaderboard formats."""

    terminal = "terminal"
    md = "md"
    csv = "csv"
    json = "json"
    html = "html"


def leaderboard(
    path: Annotated[Path, typer.Argument(help="Records: a folder or one file.")] = Path("results"),
    format: Annotated[Format, typer.Option("--format", "-f", help="How to print it.")] = Format.terminal,
    wide: Annotated[bool, typer.Option("--wide", help="On the terminal: all columns, in several tables.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it there, not on stdout.")] = None,
    as_json: Json = False,
) -> None:
    """Turn records into tables, or one HTML page: only runs with equal fingerprints share one."""
    if output:
        writable_file(output)
    from upcycle_bench import record
    from upcycle_bench.reporting import formats
    from upcycle_bench.reporting.leaderboard import build
    from upcycle_bench.util.files import write_atomically

    paths = record.record_paths(path)
    records = [record.read(each) for each in paths]
    if not records:
        raise UserError(f"no records below {path}; make one with: upcycle-bench run --strategy cluster-aware")
    chosen = "json" if as_json else format.value
    beside = {id(made): each for made, each in zip(records, paths, strict=True)}
    boards = build(records, lambda made: record.read_outcomes(beside[id(made)]))
    if chosen == "html":
        from upcycle_bench.reporting.html import page

        text = page.render(boards, list(zip(records, paths, strict=True)))
    else:
        text = formats.render(boards, chosen, width=80 if output else None, wide=wide)
    if output:
        write_atomically(output, text.encode())
    else:
        print(text, end="")
