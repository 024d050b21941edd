"""What a run is, by name: what must be the same for an interrupted training to go on, whatever ranks and machine.

    facts, command = run_facts(plan), command_of(plan)
    trained_on(plan, sessions)                  # its fingerprint is another one if they had several numbers of ranks
    different(facts, others)                    # ["code of the strategy", "settings.train.lr_factor"]
    same_dense(plan)                            # {recipe: sha256}: dense models of other ranks, devices and versions

Versions of packages, the device, the number of ranks and `moe.ep_size` are no part of it: the record lists them by
session. Of a dense model that the protocol trains, the recipe counts, not the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from upcycle_bench.data.world import World
from upcycle_bench.planning.fingerprint import (
    code_fingerprint,
    dense_facts,
    fingerprint,
    training_facts,
    training_fingerprint,
)
from upcycle_bench.planning.plan import Plan
from upcycle_bench.protocol import Protocol
from upcycle_bench.util import strict_json
from upcycle_bench.util.cache import cache_root

Facts = dict[str, Any]

# Settings that a training may change on its way.
FREE = (
    *("moe.ep_size", "train.checkpoint_every", "train.log_every"),
    *("validation.set", "validation.pairs", "validation.every"),
)
# What of the training's facts has a name of its own here, or may be another one. Of `dense` the learning rate counts.
ELSEWHERE = {"data", "captions", "checkpoint", "numerics", "dense", "world_size"}


def run_facts(plan: Plan) -> Facts:
    """What the training of a plan is, whatever the name of its protocol: `lab` and `lab-dev` have the same."""
    protocol, world = plan.protocol, plan.world
    assert world is not None and plan.dense_identity is not None
    own = protocol.dense.source == "pretrain"
    dense = dense_name(protocol, world) if own else plan.dense_identity
    facts = training_facts(protocol, world, dense)
    settings = {key: value for key, value in facts.items() if key not in ELSEWHERE}
    settings["moe"] = {key: value for key, value in settings["moe"].items() if key != "ep_size"}
    return _plain(
        {
            "strategy": plan.label,
            "package of the strategy": plan.entry.distribution,
            "code of the strategy": code_fingerprint(type(plan.strategy)),
            "options": plan.strategy.config(),
            "steps": plan.steps,
            "settings": settings,
            "peak learning rate": protocol.peak_lr,
            "data": [world.sha256, world.captions],
            "dense weights": dense,
            "seeds": [plan.init_seed, plan.train_seed],
            "numerics": facts["numerics"],
        }
    )


def dense_name(protocol: Protocol, world: World) -> str:
    """The same for all dense models of a protocol and its data, whatever ranks, machine and versions trained them."""
    return fingerprint(dense_facts(protocol, world))


def same_dense(plan: Plan) -> dict[str, str]:
    """The dense models in the cache that a protocol could have trained for this plan: recipe -> sha256."""
    if plan.protocol.dense.source != "pretrain" or plan.world is None:
        return {}
    name, found = dense_name(plan.protocol, plan.world), {}
    for path in sorted((cache_root() / "dense").glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):  # not whole, or of an earlier version
            said = strict_json.loads(path.read_text())
            if said["facts"] == name:
                found[said["recipe"]] = said["sha256"]
    return found


def with_dense(plan: Plan, recipe: str) -> Plan:
    """The plan of a run that starts from the dense model of that recipe."""
    assert plan.world is not None
    found = training_fingerprint(plan.protocol, plan.world, recipe, plan.unequal)
    return replace(plan, dense_identity=recipe, training_fingerprint=found)


def command_of(plan: Plan) -> Facts:
    """What a user typed to get this run: two runs of one command should be the same."""
    assert plan.world is not None
    checkpoint = plan.checkpoint if plan.protocol.dense.source == "checkpoint" else None
    return _plain(
        {
            "strategy": plan.label,
            "seeds": [plan.init_seed, plan.train_seed],
            "checkpoint": str(checkpoint.file) if checkpoint else "",
            **_typed(plan.protocol, plan.world),
        }
    )


def dense_command(protocol: Protocol, world: World) -> Facts:
    """The same of a dense model's training."""
    return _plain({"strategy": "dense model", **_typed(protocol, world)})


def _typed(protocol: Protocol, world: World) -> Facts:
    overrides = [text for text in protocol.overrides if text.partition("=")[0].strip() not in FREE]
    data = str(Path(world.train_shards[0]).parent) if world.option else world.name
    return {"protocol": protocol.name, "model": protocol.model, "overrides": overrides, "data": data}


def mixed_ranks(sessions: Iterable[Any]) -> list[list[int]]:
    """The pairs of number of ranks and ep_size of the sessions, sorted, if they had several; else none."""
    pairs = sorted({(session.world_size, session.ep_size) for session in sessions})
    return [list(pair) for pair in pairs] if len(pairs) > 1 else []


def trained_on(plan: Plan, sessions: Iterable[Any]) -> Plan:
    """The plan of a run that had these sessions: on several numbers of ranks, it shares no table with others."""
    ranks = mixed_ranks(sessions)
    if not ranks or plan.world is None or plan.dense_identity is None:
        return plan
    found = training_fingerprint(plan.protocol, plan.world, plan.dense_identity, plan.unequal, ranks)
    return replace(plan, training_fingerprint=found)


def different(facts: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """The names of the facts that differ, settings and options one by one."""
    mine, theirs = dict(_flat(facts)), dict(_flat(others))
    return [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _plain(facts: Facts) -> Facts:
    """As they are when they come back from a file."""
    found: Facts = strict_json.loads(strict_json.dumps(facts))
    return found
