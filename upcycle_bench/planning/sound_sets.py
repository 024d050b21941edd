"""A user's evaluation sets are checked before anything is trained: suites leave out those that are not valid.

    suites, skipped = without_bad_sets(suites, root, reporter)         # "SUITE/SET" -> why

A suite without one of its sets is another suite: its fingerprint differs, so that its means share no table with those
of the whole one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from upcycle_bench.data import evalset, evalset_check
from upcycle_bench.suite import Suite
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.progress import Reporter


def without_bad_sets(
    suites: Mapping[str, Suite], root: Path, reporter: Reporter | None = None
) -> tuple[dict[str, Suite], dict[str, str]]:
    """The suites without their sets below `root` that are missing or not valid, and why each is left out.

    A suite of which nothing is left, or that cannot do without a set, is left out itself. The first check of a set
    reads all of it, which `reporter` shows.
    """
    reporter = reporter or Reporter()
    texts = dict.fromkeys(text for suite in suites.values() for text in suite.datasets())
    why_of = {text: why for text in texts if (why := _why(root, text, [*texts], reporter))}
    found: dict[str, Suite] = {}
    skipped: dict[str, str] = {}
    for name, suite in suites.items():
        bad = {text: why_of[text] for text in suite.datasets() if text in why_of}
        try:
            found[name] = suite.without(bad) if bad else suite
            skipped |= {f"{name}/{text}": why for text, why in bad.items()}
        except UserError:  # all of its sets are bad, or it needs them all
            skipped[name] = " ".join(dict.fromkeys(bad.values()))
    return found, skipped


def _why(root: Path, text: str, texts: Collection[str], reporter: Reporter) -> str:
    """Why the set of "SET" or "SET:SPLIT" cannot be scored, or "". One line names all of `texts` that are missing."""
    name, _, split = text.partition(":")
    if not (root / name).is_dir():
        names = dict.fromkeys(other.partition(":")[0] for other in texts)
        return str(evalset.not_found(root, [other for other in names if not (root / other).is_dir()]))
    with reporter.task(f"checking evaluation set {text}"):
        faults = evalset_check.faults(root / name, split or "test")
    more = f" ({len(faults) - 1} more: `upcycle-bench data check`)" if faults[1:] else ""
    return f"evaluation set {name}: {faults[0]}{more}" if faults else ""
