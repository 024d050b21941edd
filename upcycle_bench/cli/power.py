"""`upcycle-bench power`: which differences the present seeds can show. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from upcycle_bench.cli.common import Json
from upcycle_bench.cli.leaderboard import OfProtocol, Results, collected, warn_without
from upcycle_bench.util.errors import UserError

if TYPE_CHECKING:
    from upcycle_bench.reporting.power import PowerRow


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
    warn_without(found)
    if not made:
        raise UserError(refused[0] if refused else "no run of these records succeeded; power needs scores.")
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
                "seeds needed": _seeds(row, each.asked),
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


def _seeds(row: PowerRow, asked: float | None) -> str:
    """The seeds needed, or why there is no number."""
    if row.needed:
        return str(row.needed)
    if row.hidden:
        return "none: samples hide it"
    return "over 1000" if row.difference or asked else "-"
