"""What commands print for people: tables on stdout, drawn by rich, and the scores in them.

Heavy imports stand inside the functions, since `--help` imports this module.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any


def table(title: str, rows: Sequence[dict[str, str]], *, stderr: bool = False) -> None:
    """Print rows that have the same keys; the keys head the columns."""
    from rich import box
    from rich.console import Group
    from rich.markup import escape  # without it, rich would read `cluster-aware[tau=0.8]` as markup
    from rich.table import Table

    # On a narrow terminal these columns fold, so that no digit of the others is cut off.
    wide = (
        "differs",
        "verdict",
        "summary",
        "paper",
        "status",
        "footing",
        "is",
        "from",
        "holds",
        "record or reason",
        "suite",
        "dataset",
        "metric",
        "name",
        "folder",
    )
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
    """Print anything that rich can render."""
    from rich.console import Console

    Console(highlight=False, stderr=stderr).print(renderable)


def show_scores(title: str, scores: Sequence[Mapping[str, Any]]) -> None:
    """A table for each suite, then the meaning of the signs. Averages stand for their sets, without strata."""
    suites = list(dict.fromkeys(score["suite"] for score in scores))
    if len(suites) > 1:
        print(f"{title}\n")
    shown = []
    for suite in suites:
        rows = score_rows([score for score in scores if score["suite"] == suite])
        heads = {"value": "value (± SE)"} if any("±" in row["value"] for row in rows) else {}
        table(suite if len(suites) > 1 else title, [{heads.get(key, key): row[key] for key in row} for row in rows])
        shown += rows
    show_key(shown)


def score_rows(scores: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The rows of one suite's table."""
    from upcycle_bench.suite import AVERAGE, is_average, is_averaged

    averaged = any(is_average(score["dataset"]) for score in scores)
    names = {(score["dataset"], score["metric"]) for score in scores}
    headline_of = {score["dataset"]: score["headline"] for score in scores if score["headline"]}
    return [
        {
            "dataset": score["dataset"].removeprefix(f"{AVERAGE}/"),
            "metric": score["metric"] + (f" ({score['headline']})" if score["headline"] else ""),
            "value": with_error(score["value"], score["standard_error"], score["interval"]),
            "chance": "" if score["chance"] is None else f"{score['chance']:.4f}",
            "n": f"{score['samples']:,}",
        }
        for score in scores
        if not (averaged and "[" in score["metric"])
        and not is_averaged(score["dataset"], score["metric"], headline_of.get(score["dataset"], ""), names)
    ]


def with_error(value: float, error: float | None, interval: Sequence[float] | None = None) -> str:
    """A value with its standard error. A share of 0 or 1 has none and gets the other end of its interval instead."""
    if error == 0 and interval is not None and interval[0] < interval[1]:
        return f"{value:.4f} " + (f"[≥{interval[0]:.3f}]" if value > interval[0] else f"[≤{interval[1]:.3f}]")
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def show_headlines(headlines: Mapping[str, Mapping[str, Any]], scores: Sequence[Mapping[str, Any]]) -> None:
    """Print each headline score with its direction and chance."""
    for name, headline in headlines.items():
        parts = [score["metric"] for score in scores if score["headline"] == name]
        what = parts[0] if len(parts) == 1 else f"mean of {len(parts)} scores"
        chance = "" if headline["chance"] is None else f", chance {headline['chance']:.4f}"
        better = "higher" if headline["higher_is_better"] else "lower"
        print(
            f"{name}: {with_error(headline['value'], headline['standard_error'])} ({what}, {better} is better{chance})"
        )


def show_key(rows: Sequence[Mapping[str, str]]) -> None:
    """Print the meaning of the signs in a table of scores."""
    if any("±" in row["value"] for row in rows):
        print("±, SE: one standard error, over evaluation samples (where a suite draws several times, over its draws)")
    if any("[" in row["value"] for row in rows):
        print("[≥a], [≤b]: the end of the 95 % interval, where that error is 0")


def show_skipped(skipped: Mapping[str, str], *, stderr: bool = False) -> None:
    """Print what does not run, and why: each reason once."""
    for reason in dict.fromkeys(skipped.values()):
        names = ", ".join(name for name, why in skipped.items() if why == reason)
        print(f"skipped: {names}: {reason}", file=sys.stderr if stderr else None)
