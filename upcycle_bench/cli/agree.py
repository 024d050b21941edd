"""`upcycle-bench agree`: our order of strategies beside a published one. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upcycle_bench.cli.common import Json
from upcycle_bench.cli.leaderboard import PUBLISHED, OfProtocol, Results, collected, warn_without
from upcycle_bench.util.errors import UserError

if TYPE_CHECKING:
    from upcycle_bench.reporting.agree import Agreement

CAVEAT = (
    "A published pair counts as resolved from {points} points on. Papers give single runs; DataComp reports about 0.2 "
    "points of ImageNet between seeds, so {points} points are 1.8 standard deviations of a difference, 2.5 of one run. "
    "Pairs share strategies, so the interval is rather too narrow."
)


def agree(
    results: Results = None,
    protocol: OfProtocol = None,
    published: Annotated[Path, typer.Option(metavar="FOLDER", help="What papers report, as CSV.")] = PUBLISHED,
    as_json: Json = False,
) -> None:
    """Say how far our records agree with what papers report, over the pairs that both have resolved."""
    from upcycle_bench.reporting.agree import POINTS, agreements
    from upcycle_bench.reporting.published import read_published
    from upcycle_bench.util import strict_json

    rows = read_published(published)
    found = collected(results, protocol)
    made = agreements(found.records, found.outcomes, rows)
    warn_without(found)
    if not made:
        raise UserError("no strategy pair of these records stands in the published results; run more strategies.")
    caveat = CAVEAT.format(points=POINTS)
    if as_json:
        print(strict_json.dumps({"caveat": caveat, "agreements": [_facts(each) for each in made]}, indent=2))
        return
    for each in made:
        _show(each)
    print(caveat)


def _show(found: Agreement) -> None:
    from upcycle_bench.cli.tables import table

    total, resolved = len(found.pairs), len(found.resolved)
    ours = sum(pair.resolved_by_us for pair in found.pairs)
    theirs = sum(pair.resolved_there for pair in found.pairs)
    rows = {
        "strategies of both": ", ".join(found.strategies),
        "pairs": f"{total}: resolved by us {ours}, there {theirs}, by both {resolved}",
        "agree": "nothing is resolved on both sides yet" if not resolved else f"{found.agreeing} of {resolved}",
    }
    if found.interval:
        rows["agree"] += f" (95 % interval of the share: {found.interval[0]:.2f} to {found.interval[1]:.2f})"
    rows["Kendall's tau-b"] = "none" if found.tau is None else f"{found.tau:+.2f} (of all means, resolved or not)"
    for pair in found.disagreeing:
        rows[f"{pair.first} and {pair.second}"] = (
            f"both are sure and disagree: here {pair.ours:+.4f} (p {pair.p:.3f}), there {pair.published:+.1f} points"
        )
    title = f"{found.protocol}, {found.headline} beside {found.column} of {found.setting} ({found.citation})"
    table(title, [{"what": what, "is": text} for what, text in rows.items()])


def _facts(found: Agreement) -> dict[str, object]:
    from dataclasses import asdict

    return {
        **asdict(found),
        "resolved": len(found.resolved),
        "agreeing": found.agreeing,
        "interval": found.interval,
        "disagreeing": [asdict(pair) for pair in found.disagreeing],
    }
