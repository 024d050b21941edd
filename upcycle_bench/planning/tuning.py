"""Plans of a tuning: the candidates on the protocol's tuning sets. The rule stands in the protocol's table `[tuning]`.

    table, dev = tuning_of(registry, protocol)          # `lab` is tuned on `lab-dev`
    refuse_tuning_seeds(table, pairs)                   # what chose the options reports nothing
    plans = candidates(registry, "drop-upcycling", table, dev, [{"ratio": "0.75"}])     # the defaults come first

Nothing is run; `upcycle_bench.tune` does that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from upcycle_bench.planning.matrix import SeedPair
from upcycle_bench.planning.plan import Paths, Plan, make_plan
from upcycle_bench.planning.registry import Registry
from upcycle_bench.protocol import Protocol, Tuning, load_protocol
from upcycle_bench.util.errors import UserError, unknown
from upcycle_bench.util.progress import Reporter

TRAINS = ("model", "threads", "dense", "data", "moe", "train", "strategies")  # what a candidate's training depends on


def tuning_of(registry: Registry, protocol: Protocol) -> tuple[Tuning, Protocol]:
    """The protocol's rule, and the protocol on which candidates are scored, with the same overrides.

    UserError where there is no rule, where that one trains otherwise, and where what decides there is reported here.
    """
    table = protocol.tuning
    if table is None:
        raise UserError(
            f"protocol {protocol.name} has no [tuning] table, so no row is tuned under it; lab has one, and a protocol "
            "of your own can."
        )
    overrides = shared_overrides(protocol.overrides)
    dev = load_protocol(registry.get("protocol", table.protocol).target, overrides)
    if others := [name for name in TRAINS if getattr(dev, name) != getattr(protocol, name)]:
        raise UserError(
            f"protocol {protocol.name} is tuned on {dev.name}, which trains otherwise ({', '.join(others)}); "
            "name another one in its [tuning] table."
        )
    deciding = _sets_of(dev, table.headline)
    if both := deciding & _sets_of(protocol):
        raise UserError(
            f"protocol {protocol.name} reports {', '.join(sorted(both))}, by which {dev.name} would choose; its "
            "[tuning] table needs another headline."
        )
    return table, dev


def shared_overrides(overrides: Iterable[str]) -> list[str]:
    """The overrides that candidates are run with, too: those of the rule itself are no setting of theirs."""
    return [override for override in overrides if not override.startswith("tuning.")]


def _sets_of(protocol: Protocol, headline: str | None = None) -> set[str]:
    """The evaluation sets of that headline score, or of all; UserError for one that no suite of the protocol has."""
    named = {
        name: sets for settings in protocol.suites.values() for name, sets in settings.get("headlines", {}).items()
    }
    if headline is None:
        return {name for settings in protocol.suites.values() for name in settings.get("sets", ())}
    if headline not in named:
        raise unknown(f"headline score of protocol {protocol.name}", headline, named)
    return set(named[headline])


def refuse_tuning_seeds(table: Tuning, pairs: Iterable[SeedPair]) -> None:
    """UserError for a seed to be reported that is one of the tuning."""
    for seed in (seed for pair in pairs for seed in pair):
        if seed in table.seeds:
            raise UserError(
                f"seed {seed} is one of the tuning ({', '.join(map(str, table.seeds))}), which chooses the options; "
                "report another one."
            )


def candidates(
    registry: Registry,
    strategy: str,
    table: Tuning,
    dev: Protocol,
    tries: Sequence[Mapping[str, str]],
    *,
    paths: Paths | None = None,
    reporter: Reporter | None = None,
) -> list[Plan]:
    """A plan for the defaults, then one for each of `tries`. UserError for too many, and for one that stands twice."""
    if len(tries) + 1 > table.candidates:
        raise UserError(
            f"{len(tries)} times --try, and the defaults, are {len(tries) + 1} configurations; every strategy has at "
            f"most {table.candidates} (tuning.candidates of the protocol)."
        )
    plans: list[Plan] = []
    for options in ({}, *tries):
        world = plans[0].world if plans else None
        plan = make_plan(registry, strategy, dev, options=options, paths=paths, reporter=reporter, world=world)
        if plan.label in (each.label for each in plans):
            written = ",".join(f"{key}={value}" for key, value in options.items())
            raise UserError(f"--try {written}: that is {plan.label}, which is a candidate already; leave it out.")
        plans.append(plan)
    return plans
