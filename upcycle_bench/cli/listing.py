"""`upcycle-bench list`: strategies, suites and protocols, and the package of each. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, fields
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upcycle_bench.cli.common import Json, open_registry
from upcycle_bench.cli.tables import table
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError

if TYPE_CHECKING:
    from upcycle_bench.planning.registry import Registry


class Kind(str, Enum):
    """What `list` can show."""

    strategies = "strategies"
    suites = "suites"
    protocols = "protocols"


_KIND = {"strategies": "strategy", "suites": "suite", "protocols": "protocol"}


def list_(
    kind: Annotated[Kind | None, typer.Argument(help="What to list; everything if left out.")] = None,
    as_json: Json = False,
) -> None:
    """List strategies, suites and protocols, and who brings them."""
    registry = open_registry()
    kinds = [kind.value] if kind else [each.value for each in Kind]
    listing = {each: rows(registry, each) for each in kinds}
    if as_json:
        print(strict_json.dumps({**listing, "broken": registry.broken}, indent=2))
        return
    for each, entries in listing.items():
        show_listing(each, entries)


def show_listing(kind: str, entries: Sequence[dict[str, Any]]) -> None:
    """What `list` prints: papers without their arXiv numbers; the package in the title where all entries share it."""
    hidden = {"url", "reconstructed", "options", "sources"}
    owners = {entry["from"] for entry in entries}
    if len(owners) == 1:
        kind, hidden = f"{kind} from {owners.pop()}", hidden | {"from"}
    rows = [{key: value for key, value in entry.items() if key not in hidden} for entry in map(_marked, entries)]
    table(kind, [{key: value.split(", arXiv")[0] for key, value in row.items()} for row in rows])


def _marked(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with its mark for a status: a reconstruction says so wherever its name stands."""
    from upcycle_bench.record_schema import kind_of

    status = entry.get("status", "")
    return entry if not status else entry | {"status": kind_of(status, entry["reconstructed"]) or status}


def _option(spec: Field[Any]) -> dict[str, Any]:
    """Name, default and description of a strategy's option; a pydantic field holds the last two."""
    default = getattr(spec.default, "default", spec.default)
    return {"name": spec.name, "default": default, "description": getattr(spec.default, "description", None)}


def rows(registry: Registry, kind: str) -> list[dict[str, Any]]:
    """One row per entry of `strategies`, `suites` or `protocols`, sorted by name."""
    from upcycle_bench.protocol import load_protocol

    listed = []
    for name, entry in registry.entries(_KIND[kind]).items():
        row: dict[str, Any] = {"name": name}
        if kind == "protocols":
            try:
                protocol = load_protocol(entry.target)
            except UserError as error:  # a plugin's protocol is broken; the others are listed all the same
                registry.broken[f"{entry.distribution}:{name}"] = str(error)
                continue
            row |= {"summary": protocol.summary, "model": protocol.model, "sources": protocol.sources}
        else:
            info = entry.target.info
            row |= {"summary": info.summary, "paper": info.paper}
            if kind == "strategies":
                row |= {"status": info.status, "url": info.url, "reconstructed": list(info.reconstructed)}
                row["footing"] = info.footing
                row["options"] = [_option(spec) for spec in fields(entry.target)]
        listed.append(row | {"from": entry.owner})
    return listed
