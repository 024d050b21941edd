"""What the options of a command plan: a run of each strategy. Imports nothing heavy.

plans = make_plans("all", "lab", option=None, overrides=["moe.experts=4"], ..., reporter=terminal_reporter())
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_bench.cli.common import interruptible, key_value, names_of, open_registry, uncollected
from upcycle_bench.util.errors import UserError

if TYPE_CHECKING:
    from upcycle_bench.planning.plan import Plan
    from upcycle_bench.util.progress import Reporter


def make_plans(
    strategy: str,
    protocol: str,
    option: list[str] | None,
    overrides: list[str] | None,
    data: str | None,
    checkpoint: str | None,
    pixels: list[str] | None,
    interpolate: bool,
    eval_data: Path | None,
    reporter: Reporter,
    suite: str | None = None,
    building: contextlib.AbstractContextManager[None] | None = None,
) -> list[Plan]:
    """A plan for each strategy that is named, with both seeds 0.

    A plan builds the data that the cache lacks: `building` says what an interruption does then.
    """
    with uncollected():
        from upcycle_bench.model.pixels import parsed
        from upcycle_bench.model.pretrained import Choices
        from upcycle_bench.planning import plans
        from upcycle_bench.planning.matrix import strategy_names
        from upcycle_bench.planning.plan import Paths
        from upcycle_bench.protocol import load_protocol

    registry = open_registry()
    names = strategy_names(registry, strategy)
    if option and len(names) > 1:
        raise UserError("--option belongs to one strategy; run strategies with options one by one.")
    choices = Choices(parsed(pixels or []), interpolate)
    paths = Paths(data=data, checkpoint=checkpoint, eval_data=eval_data, choices=choices)
    options = dict(key_value(text) for text in option or [])
    settings = load_protocol(registry.get("protocol", protocol).target, overrides)
    suites = names_of(suite, "--suite")
    with uncollected():
        import open_clip  # noqa: F401  (the slowest import of all; a plan needs its configurations)
    with building or interruptible("nothing was written"):
        return plans.make_plans(
            registry, names, settings, options=options, paths=paths, suites=suites, reporter=reporter
        )
