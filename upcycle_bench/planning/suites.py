"""The suites of a protocol: those that a user names, each with the protocol's settings.

make_suites(registry, protocol)                     # {"zero-shot": ..., "retrieval": ...}: all but optional ones
make_suites(registry, protocol, ["linear-probe"])   # an optional one runs where it is named, or "all"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from upcycle_bench.planning.registry import Registry
from upcycle_bench.protocol import Protocol
from upcycle_bench.suite import Suite
from upcycle_bench.util.errors import UserError, first_problem, unknown


def make_suites(registry: Registry, protocol: Protocol, names: Sequence[str] = ()) -> dict[str, Suite]:
    """The suites of those names with the protocol's settings, in the protocol's order; `names` as in `make_plan`."""
    every = protocol.suites | protocol.optional_suites
    if "all" in names and len(names) > 1:
        raise UserError("--suite: 'all' stands alone; it names every suite of the protocol.")
    for name in names:
        if name != "all" and name not in every:
            raise unknown(f"suite of protocol {protocol.name}", name, every)
    chosen = every if "all" in names else names or protocol.suites
    return {name: _suite(registry, name, settings) for name, settings in every.items() if name in chosen}


def _suite(registry: Registry, name: str, settings: dict[str, Any]) -> Suite:
    target = registry.get("suite", name).target
    for key in settings:
        if key not in (known := [spec.name for spec in fields(target)]):
            raise unknown(f"setting of suite {name}", key, known)
    try:
        suite: Suite = target(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        )
    except ValidationError as error:
        where, what = first_problem(error)
        raise UserError(f"protocol: suites.{'.'.join(filter(None, (name, where)))}: {what}.") from None
    return suite
