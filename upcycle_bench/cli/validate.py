"""`upcycle-bench validate`: whether records that others sent can be what they say. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upcycle_bench.cli.common import Json, open_registry, uncollected
from upcycle_bench.cli.tables import table
from upcycle_bench.util import strict_json

if TYPE_CHECKING:
    from upcycle_bench.reporting.validate import Validation

Sets = Annotated[Path | None, typer.Option(help="Folder with the evaluation sets of runs on local data.")]


def validate(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Records: files or folders.")],
    eval_data: Sets = None,
    as_json: Json = False,
) -> None:
    """Check records that others sent: hashes, fingerprints, scores from outcomes, certificates, impossible values."""
    found = validated(paths, eval_data)
    if as_json:
        print(strict_json.dumps(found.facts(), indent=2))
    else:
        show_validation(found)
    if not found.sound:
        raise typer.Exit(1)


def validated(paths: Sequence[Path], eval_data: Path | None) -> Validation:
    """The validation of the records below `paths`, by what is installed here."""
    with uncollected():
        from upcycle_bench.reporting.sent import Here
        from upcycle_bench.reporting.validate import validate as check_all

    return check_all(paths, Here(open_registry(), eval_data))


def show_validation(found: Validation) -> None:
    """A row for each record, then a line for each fault, for what could not be checked, and for files passed over."""
    wrong = [finding for finding in found.findings if finding.wrong]
    rows = []
    for path in found.records:
        checks = list(dict.fromkeys(finding.check for finding in found.of(path) if finding.wrong))
        strange = any(finding.kind == "warning" for finding in found.of(path))
        made = found.sent[path].record if path in found.sent else None
        rows.append(
            {
                "record": printable(path.name),
                "status": made.status if made else "",
                "verdict": f"wrong: {', '.join(checks)}"
                if checks
                else "sound, see the warning"
                if strange
                else "sound",
            }
        )
    table(f"{len(found.records):,} records", rows)
    for finding in wrong:
        print(f"{printable(str(finding.path))}: {finding.check}: {printable(finding.what)}")
    for finding in found.findings:
        if finding.kind == "warning":
            print(f"warning: {printable(str(finding.path))}: {finding.check}: {printable(finding.what)}")
    said: dict[str, int] = {}
    for finding in found.findings:
        if finding.kind == "unchecked":
            line = f"{finding.check}: {printable(finding.what)}"
            said[line] = said.get(line, 0) + 1
    for line, count in said.items():
        print(f"not checked, of {count:,} of {len(found.records):,}: {line}")
    for reason in dict.fromkeys(found.passed_over.values()):
        names = [printable(str(path)) for path, why in found.passed_over.items() if why == reason]
        more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
        print(f"passed over, {reason}: {', '.join(names[:5])}{more}")
    bad = len({finding.path for finding in wrong})
    print(f"{bad:,} of {len(found.records):,} records are wrong" if bad else "all records are sound")


def printable(text: str) -> str:
    """The text without what a terminal would obey: it comes from strangers."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
