"""What `upcycle-bench list` shows of each registered thing."""

from __future__ import annotations

from typing import Any

from upcycle_bench.protocol import load_protocol
from upcycle_bench.registry import Registry

_KIND = {"strategies": "strategy", "suites": "suite", "protocols": "protocol"}


def rows(registry: Registry, kind: str) -> list[dict[str, Any]]:
    """One row per entry of `strategies`, `suites` or `protocols`, sorted by name."""
    listed = []
    for name, entry in registry.entries(_KIND[kind]).items():
        row: dict[str, Any] = {"name": name}
        if kind == "protocols":
            protocol = load_protocol(entry.target)
            row |= {"summary": protocol.summary, "model": protocol.model, "sources": protocol.sources}
        else:
            info = entry.target.info
            row |= {"summary": info.summary, "paper": info.paper}
            if kind == "strategies":
                row |= {"status": info.status, "url": info.url, "reconstructed": list(info.reconstructed)}
        listed.append(row | {"from": entry.owner})
    return listed
