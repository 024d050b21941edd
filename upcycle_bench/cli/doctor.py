"""`upcycle-bench doctor`: what this machine can do, and one command for each thing it cannot. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from upcycle_bench.cli.common import Json
from upcycle_bench.cli.tables import show
from upcycle_bench.util import strict_json

if TYPE_CHECKING:
    from rich.table import Table

    from upcycle_bench.planning.machine import Check


def doctor(as_json: Json = False) -> None:
    """Check what this machine can do: a tick, or the remedy."""
    from upcycle_bench.planning.machine import checks, healthy

    found = checks()
    if as_json:
        print(strict_json.dumps({"ok": healthy(found), "checks": [asdict(check) for check in found]}, indent=2))
    else:
        show(render(found))
    if not healthy(found):
        raise typer.Exit(1)


def render(found: list[Check]) -> Table:
    """The checks as a rich table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text  # remedies hold brackets, which rich would read as markup

    table = Table("", "check", "found", "what to do", box=box.SIMPLE)
    for check in found:
        mark = ("ok", "green") if check.ok else ("MISSING", "red") if check.required else ("note", "yellow")
        table.add_row(Text(*mark), *(Text(cell, overflow="fold") for cell in (check.name, check.found, check.remedy)))
    return table
