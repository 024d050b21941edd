"""The registry: finds strategies, suites and protocols by entry points, our own and those of plugins alike.

    registry = load_registry()
    registry.strategies["cluster-aware"].target     # the class
    registry.get("strategy", "cluster")             # UserError: did you mean 'cluster-aware'?

A plugin that cannot be imported, or that misspells a hook, stands in `broken` with the reason; the others work. If two
plugins register one name, the error names both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import pluggy

from upcycle_bench import hookspecs
from upcycle_bench.util.errors import UserError, unknown

KINDS = ("strategy", "suite", "protocol")


@dataclass(frozen=True)
class Entry:
    """One registered thing: its name, its class (or a protocol's file), and the distribution that brings it."""

    name: str
    target: Any
    distribution: str
    version: str

    @property
    def owner(self) -> str:
        """The distribution and its version, for users."""
        return f"{self.distribution} {self.version}".strip()


@dataclass
class Registry:
    """Everything registered, by name, in alphabetical order; `broken`: for each plugin that failed, why."""

    strategies: dict[str, Entry] = field(default_factory=dict)
    suites: dict[str, Entry] = field(default_factory=dict)
    protocols: dict[str, Entry] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def entries(self, kind: str) -> dict[str, Entry]:
        """All entries of a kind: `strategy`, `suite` or `protocol`."""
        return {"strategy": self.strategies, "suite": self.suites, "protocol": self.protocols}[kind]

    def get(self, kind: str, name: str) -> Entry:
        """The entry of that name; a UserError for an unknown one gives near matches and plugins that failed to load."""
        entries = self.entries(kind)
        if name not in entries:
            hint = "".join(f"Plugin {plugin} did not load: {why}. " for plugin, why in self.broken.items()).strip()
            raise unknown(kind, name, entries, hint)
        return entries[name]


def create_plugin_manager() -> pluggy.PluginManager:
    """A plugin manager that knows our hooks, and no plugin yet."""
    manager = pluggy.PluginManager(hookspecs.GROUP)
    manager.add_hookspecs(hookspecs)
    return manager


def load_registry(extra: dict[str, ModuleType | Any] | None = None) -> Registry:
    """Load the plugins of all entry points, then `extra` ones (name -> object with hooks; for tests).

    Raises UserError if two plugins register one name.
    """
    registry = Registry()
    for point in sorted(entry_points(group=hookspecs.GROUP), key=lambda p: (_owner(p)[0], p.name)):
        owner, version = _owner(point)
        try:
            plugin = point.load()
        except Exception as error:  # a plugin's import may fail in any way; the others must still load
            registry.broken[f"{owner}:{point.name}"] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        _register(registry, plugin, f"{owner}:{point.name}", owner, version)
    for name, plugin in (extra or {}).items():
        _register(registry, plugin, name, name, "")
    for kind in KINDS:
        entries = registry.entries(kind)
        for name in sorted(entries):
            entries[name] = entries.pop(name)
    return registry


def _owner(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("unknown", "")


def _register(registry: Registry, plugin: Any, plugin_name: str, owner: str, version: str) -> None:
    """Add what one plugin brings; it has a manager of its own, so a broken plugin cannot disturb the others."""
    manager = create_plugin_manager()
    manager.register(plugin, name=plugin_name)
    try:
        manager.check_pending()
        found: list[tuple[str, str, Any]] = []
        for classes in manager.hook.register_strategies():
            found += [("strategy", strategy.info.name, strategy) for strategy in classes]
        for classes in manager.hook.register_suites():
            found += [("suite", suite.info.name, suite) for suite in classes]
        for paths in manager.hook.register_protocols():
            found += [("protocol", path.stem, path) for path in paths]
    except Exception as error:
        registry.broken[plugin_name] = f"{type(error).__name__}: {error}".splitlines()[0]
        return
    for kind, name, target in found:
        entries = registry.entries(kind)
        if name in entries:
            raise UserError(
                f"two plugins register a {kind} named {name!r}: {entries[name].owner} and {owner} {version}; "
                "uninstall one of them or rename its plugin."
            )
        entries[name] = Entry(name, target, owner, version)
