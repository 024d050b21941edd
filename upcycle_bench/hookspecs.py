"""All extension points. A plugin is any module that an entry point of the group `upcycle_bench` names.

# pyproject.toml of the plugin:   [project.entry-points.upcycle_bench]
#                                 my-idea = "my_package.my_idea"
from upcycle_bench.hookspecs import hookimpl

@hookimpl
def register_strategies():
    return [MyIdea]
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pluggy

from upcycle_bench.strategy import Strategy
from upcycle_bench.suite import Suite

GROUP = "upcycle_bench"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def register_strategies() -> Iterable[type[Strategy]]:
    """Return the strategy classes this plugin brings."""
    raise NotImplementedError


@hookspec
def register_suites() -> Iterable[type[Suite]]:
    """Return the evaluation suite classes this plugin brings."""
    raise NotImplementedError


@hookspec
def register_protocols() -> Iterable[Path]:
    """Return the TOML files of the protocols this plugin brings; a file's name is the protocol's name."""
    raise NotImplementedError
