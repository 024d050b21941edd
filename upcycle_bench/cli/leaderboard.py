"""`upcycle-bench leaderboard`: records as tables; `power`: which differences they can show. Imports nothing heavy."""

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
    format: Annotated[Format, typer.Option("--format", "-f", help="How to print it.")] = Format.terminal,
    wide: Annotated[bool, typer.Option("--wide", help="On the terminal: all columns, in several tables.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it there, not on stdout.")] = None,
    as_json: Json = False,
) -> None:
    """Turn records into tables, or one HTML page: only runs with equal fingerprints share one."""
    if output:
        writable_file(output)
    from upcycle_bench.reporting import formats
    from upcycle_bench.reporting.leaderboard import build
    from upcycle_bench.util.files import write_atomically

    found = collected(results, protocol)
    boards = build(found.records, found.outcomes)
    boards = formats.only(boards, names_of(strategies, "--strategies"))
    chosen = "json" if as_json else format.value
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


def power(
    results: Results = None,
    protocol: OfProtocol = None,
    difference: Annotated[
        float | None, typer.Option(min=0.0, help="How many seeds a difference of this size needs; else each row's own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which differences the present seeds could detect, and how many seeds a difference needs."""
    from dataclasses import asdict

    from upcycle_bench.cli.tables import table
    from upcycle_bench.reporting.leaderboard import build
    from upcycle_bench.reporting.power import CHANCE, detectable
    from upcycle_bench.util import strict_json

    found = collected(results, protocol)
    made, refused = [], []
    for board in build(found.records, found.outcomes):
        for headline in board.headlines:
            try:
                made.append(detectable(board, headline, difference))
            except UserError as error:
                refused.append(str(error))
    if not made:
        raise UserError(refused[0])
    if as_json:
        print(strict_json.dumps([asdict(each) for each in made], indent=2))
        return
    for each in made:
        rows = [
            {
                "strategy": row.label,
                "n": str(row.seeds),
                f"vs {each.reference}": f"{row.difference:+.4f}",
                "detectable": "" if row.smallest is None else f"{row.smallest:.4f}",
                "seeds needed": "over 1000" if row.needed is None else str(row.needed),
            }
            for row in each.rows
        ]
        wanted = "its own difference" if each.asked is None else f"{each.asked:g}"
        table(f"{each.protocol}, {each.headline}", rows)
        print(
            f"detectable: found with a chance of {CHANCE:.0%} by the n seeds, among {each.tests} tests; seeds needed: "
            f"for {wanted}.\nOne pair of runs differs by {each.spread:.4f} more or less (pooled), the samples add "
            f"{each.samples:.4f} to the standard error.\n"
        )


def collected(results: list[Path] | None, protocol: str | None) -> Collected:
    """The records; on stderr what is passed over. UserError where there are none."""
    from upcycle_bench.reporting.collect import collect

    found = collect(results or [Path("results")])
    for path, why in found.passed_over.items():
        print(f"passed over: {path}: {why}", file=sys.stderr)
    return found.only(protocol)
