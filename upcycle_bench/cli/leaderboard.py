"""`upcycle-bench leaderboard`: records as tables. Imports nothing heavy."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upcycle_bench.cli.common import Json, names_of, writable_file
from upcycle_bench.util.errors import UserError

if TYPE_CHECKING:
    from upcycle_bench.reporting.collect import Collected


class Format(str, Enum):
    """Leaderboard formats."""

    terminal = "terminal"
    md = "md"
    csv = "csv"
    json = "json"
    latex = "latex"
    html = "html"


class View(str, Enum):
    """What rows are compared at."""

    steps = "steps"
    compute = "compute"


PUBLISHED = Path("results/published")
Results = Annotated[list[Path] | None, typer.Argument(help="Records: folders or files; of copies one counts.")]
OfProtocol = Annotated[str | None, typer.Option("--protocol", "-p", help="Only runs of this protocol.")]


def leaderboard(
    results: Results = None,
    protocol: OfProtocol = None,
    strategies: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only these strategies and the reference.")
    ] = None,
    metrics: Annotated[str | None, typer.Option(metavar="WORDS", help="Also scores whose name has one of a,b.")] = None,
    view: Annotated[
        View, typer.Option(help="Compare at equal steps, or with references of as much compute.")
    ] = View.steps,
    format: Annotated[Format, typer.Option("--format", "-f", help="How to print it.")] = Format.terminal,
    wide: Annotated[bool, typer.Option("--wide", help="On the terminal: all columns, in several tables.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it there, not on stdout.")] = None,
    as_json: Json = False,
) -> None:
    """Turn records into tables, or one HTML page: only runs with equal fingerprints share one."""
    chosen = "json" if as_json else format.value
    if output:
        writable_file(output)
    elif chosen == "html" and sys.stdout.isatty():
        raise UserError("--format html is a file for a browser; give --output FILE.html.")
    from upcycle_bench.reporting import formats
    from upcycle_bench.reporting.leaderboard import build
    from upcycle_bench.util.files import write_atomically

    found = collected(results, protocol)
    boards = build(found.records, found.outcomes, view.value)
    warn_without(found)
    boards = formats.only(boards, names_of(strategies, "--strategies"))
    if chosen == "html":
        from functools import partial

        from upcycle_bench.reporting.html import page
        from upcycle_bench.reporting.published import beside, read_published

        known = read_published(PUBLISHED) if PUBLISHED.is_dir() else []
        text = page.render(boards, list(zip(found.records, found.paths, strict=True)), partial(beside, known))
    else:
        words = names_of(metrics, "--metrics")
        text = formats.render(boards, chosen, width=80 if output else None, wide=wide, metrics=words)
    if output:
        write_atomically(output, text.encode())
    else:
        print(text, end="")


def collected(results: list[Path] | None, protocol: str | None) -> Collected:
    """The records; on stderr what is passed over. UserError where there are none."""
    from upcycle_bench.reporting.collect import collect

    found = collect(results or [Path("results")])
    for path, why in found.passed_over.items():
        print(f"passed over: {path}: {why}", file=sys.stderr)
    return found.only(protocol)


def warn_without(found: Collected) -> None:
    """Say on stderr whose outcomes could not be read, once they were asked for."""
    for why in dict.fromkeys(found.without.values()):
        print(f"warning: {why} Errors of its table are over seeds alone.", file=sys.stderr)
