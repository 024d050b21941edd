"""What `upcycle-bench list` shows of each registered thing."""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any

from upcycle_bench.errors import UserError
from upcycle_bench.protocol import load_protocol
from upcycle_bench.registry import Registry

_KIND = {"strategies": "strategy", "suites": "suite", "protocols": "protocol"}


def _option(spec: Field[Any]) -> dict[str, Any]:
    """An option's name, default and description; a pydantic field holds the last two."""
    default = getattr(spec.default, "default", spec.default)
    return {"name": spec.name, "default": default, "description": getattr(spec.default, "description", None)}


def rows(registry: Registry, kind: str) -> list[dict[str, Any]]:
    """One row per entry of `strategies`, `suites` or `protocols`, sorted by name."""
    listed = []
    for name, entry in registry.entries(_KIND[kind]).items():
        row: dict[str, Any] = {"name": name}
        if kind == "protocols":
            try:
                protocol = load_protocol(entry.target)
            except UserError as error:  # an outsider's; the others are listed all the same
                registry.broken[f"{entry.distribution}:{name}"] = str(error)
                continue
            row |= {"summary": protocol.summary, "model": protocol.model, "sources": protocol.sources}
        else:
            info = entry.target.info
            row |= {"summary": info.summary, "paper": info.paper}
            if kind == "strategies":
                row |= {"status": info.status, "url": info.url, "reconstructed": list(info.reconstructed)}
                row["options"] = [_option(spec) for spec in fields(entry.target)]
        listed.append(row | {"from": entry.owner})
    return listed
