"""`upcycle-bench diff`: two records side by side. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upcycle_bench.cli.common import Json, open_registry, uncollected
from upcycle_bench.cli.tables import table
from upcycle_bench.cli.validate import printable
from upcycle_bench.util import strict_json
from upcycle_bench.util.uncertainty import Z

if TYPE_CHECKING:
    from upcycle_bench.reporting.difference import Difference, PairedScore


def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="A record.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another record.")],
    every: Annotated[bool, typer.Option("--all", help="All scores, also strata and sets that an average has.")] = False,
    as_json: Json = False,
) -> None:
    """Compare two records: what differs in what was run, and each score, paired over samples."""
    with uncollected():
        from upcycle_bench.reporting.difference import compare
        from upcycle_bench.reporting.sent import Here, open_whole

    found = compare(open_whole(one), open_whole(other), Here(open_registry()))
    if as_json:
        print(strict_json.dumps(found.facts(), indent=2))
        return
    show_difference(found, every)


def show_difference(found: Difference, every: bool = False) -> None:
    """A table of what differs, the headline scores, a table of the scores, then what could not be paired."""
    rows = [
        {"differs": f"{kind}: {name}", "A": _short(one), "B": _short(other)}
        for kind, values in found.settings.items()
        for name, (one, other) in values.items()
    ]
    if rows:
        table("what was run", rows)
    else:
        print("nothing differs in what was run\n")
    shown = [score for score in found.scores if every or _shown(score, found)]
    several = len({score.suite for score in shown}) > 1
    table("scores", [_row(score, several) for score in shown])
    for name, headline in found.headlines.items():
        better = "higher" if headline.higher_is_better else "lower"
        error = "" if headline.standard_error is None else f" ± {Z * headline.standard_error:.4f} at most"
        pair = f"{headline.one:.4f}, {headline.other:.4f}"
        print(f"{name} ({better} is better): {pair}: {headline.difference:+.4f}{error}")
    if any(score.interval for score in shown):
        print("±: half of a 95 % interval over the samples, which both runs share; p: McNemar's exact test")
    for note in found.notes:
        print(f"note: {note}")


def _shown(score: PairedScore, found: Difference) -> bool:
    """Without strata, and without the single sets that an average stands for."""
    from upcycle_bench.suite import is_averaged

    names = {(each.dataset, each.metric) for each in found.scores if each.suite == score.suite}
    headline = next((each.headline for each in found.scores if each.dataset == score.dataset and each.headline), "")
    return "[" not in score.metric and not is_averaged(score.dataset, score.metric, headline, names)


def _row(score: PairedScore, several: bool) -> dict[str, str]:
    half = "" if score.standard_error is None else f" ± {Z * score.standard_error:.4f}"
    return {
        **({"suite": score.suite} if several else {}),
        "dataset": score.dataset,
        "metric": score.metric,
        "A": f"{score.one:.4f}",
        "B": f"{score.other:.4f}",
        "B - A": f"{score.difference:+.4f}{half}",
        "p": "" if score.p is None else f"{score.p:.2g}",
    }


def _short(value: Any) -> str:
    """A value for people; of a long one the beginning."""
    text = "none" if value is None else value if isinstance(value, str) else strict_json.dumps(value)
    return printable(text if len(text) <= 24 else text[:21] + "...")
