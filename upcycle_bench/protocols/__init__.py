"""The protocols that ship: one TOML file each, registered like an outsider's."""

from collections.abc import Iterable
from pathlib import Path

from upcycle_bench.hookspecs import hookimpl


@hookimpl
def register_protocols() -> Iterable[Path]:
    """Every TOML file beside this module."""
    return sorted(Path(__file__).parent.glob("*.toml"))
